from setuptools import setup

from gpt2fast.build import BuildExtension, extension

setup(
    name="scale_package",
    version="1.0",
    packages=["scale_package"],
    ext_modules=[
        extension("scale_package._C", ["csrc/binding.cpp"], kernels=["csrc/scale_bias_add.h"], include_dirs=["csrc"])
    ],
    cmdclass={"build_ext": BuildExtension},
)
