"""transformers' common model tests over our classes; test_hf_own_tests.py runs this file in a process of its own."""

import importlib
import sys
import types
import unittest

import torch
from fetch_transformers import model_tests
from hf_models import CLASSES
from transformers import GPT2Config

import gpt2fast

PACKAGE = "transformers_tests"
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def import_tests() -> types.ModuleType:
    """Loads the file as a module of a package. The two modules that the source distribution lacks are there, with empty
    classes."""
    package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    package.__path__ = [str(model_tests(fetch=False).parent)]
    for name, mixin in LEFT_OUT.items():
        for part in (name.split(".")[0], name):
            module = sys.modules[f"{PACKAGE}.{part}"] = types.ModuleType(f"{PACKAGE}.{part}")
            module.__path__ = []
        setattr(module, mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


common = import_tests()


class Sizes:
    """The tester of a model, with what the common tests need."""

    batch_size, seq_length, num_choices, num_labels = 13, 7, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    is_training, type_sequence_label_size = True, 2

    def get_config(self) -> GPT2Config:
        return GPT2Config(
            n_embd=self.hidden_size, n_layer=self.num_hidden_layers, n_head=self.num_attention_heads,
            vocab_size=self.vocab_size, num_labels=self.num_labels, pad_token_id=98, bos_token_id=98, eos_token_id=98,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[GPT2Config, dict]:
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, self.vocab_size)
        return self.get_config(), dict(input_ids=ids, attention_mask=common.random_attention_mask(shape))


class ModelTests(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = tuple(getattr(gpt2fast, name) for name in CLASSES)

    def setUp(self):
        self.model_tester = Sizes()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels))
        if return_labels and model_class is gpt2fast.GPT2DoubleHeadsModel:
            B, choices, T = Sizes.batch_size, Sizes.num_choices, Sizes.seq_length
            ids = torch.zeros(B, choices, T, dtype=torch.int64)
            inputs |= dict(input_ids=ids, labels=ids, mc_token_ids=ids[:, :, 0], mc_labels=ids[:, 0, 0])
            inputs.pop("attention_mask", None)
        return inputs

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        """It wants a gradient of every parameter, and the second head of GPT2DoubleHeadsModel has none."""
        classes = self.all_model_classes
        self.all_model_classes = tuple(kind for kind in classes if kind is not gpt2fast.GPT2DoubleHeadsModel)
        super().check_training_gradient_checkpointing(*args, **kwargs)
