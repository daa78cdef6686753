from setuptools import setup

from gpt2fast.build import BuildExtension, extension
from gpt2fast.new_op import TEMPLATE

KERNEL = TEMPLATE / "scale_bias_add" / "csrc"  # what gpt2fast new-op writes

setup(
    name="scale_package",
    version="1.0",
    packages=["scale_package"],
    ext_modules=[
        extension(
            "scale_package._C",
            ["csrc/others.cpp", str(KERNEL / "binding.cpp")],
            kernels=[str(KERNEL / "scale_bias_add.h")],
            include_dirs=[str(KERNEL)],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
