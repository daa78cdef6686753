"""A drop-in for transformers' GPT-2: classes with the same names, on our ops. Nothing is patched globally."""

from transformers import GPT2Config

from .convert import optimize, restore
from .models import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from .report import Report, report

__all__ = [
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "Report",
    "optimize",
    "report",
    "restore",
]
