"""CrystalCoder for Hugging Face transformers: importing this package makes the Auto classes know it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_crystalcoder import CrystalCoderConfig
from .modeling_crystalcoder import CrystalCoderLMHeadModel, CrystalCoderModel
from .tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

AutoConfig.register("crystalcoder", CrystalCoderConfig)
AutoModel.register(CrystalCoderConfig, CrystalCoderModel)
AutoModelForCausalLM.register(CrystalCoderConfig, CrystalCoderLMHeadModel)
AutoTokenizer.register(CrystalCoderConfig, fast_tokenizer_class=CrystalCoderTokenizerFast)

# Makes save_pretrained write these files beside the weights, for `trust_remote_code=True` where this package is absent.
CrystalCoderConfig.register_for_auto_class()
CrystalCoderModel.register_for_auto_class("AutoModel")
CrystalCoderLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
CrystalCoderTokenizerFast.register_for_auto_class("AutoTokenizer")

__all__ = ["CrystalCoderConfig", "CrystalCoderLMHeadModel", "CrystalCoderModel", "CrystalCoderTokenizerFast"]
