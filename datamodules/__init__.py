"""Data: LLaVA-format conversations about pictures, and the embedded handwritten-digits task."""

from datamodules.digits_vqa import DigitsVQA
from datamodules.llava import LlavaData, SplitSummary

__all__ = ["DigitsVQA", "LlavaData", "SplitSummary"]
