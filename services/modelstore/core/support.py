"""Which models are served: those whose run is exact, by name; everything else is refused with its cause.

The engine flattens a batch into one row and attends through its own paged cache. That is exact for
decoders whose layers are all attention, with rotary positions of fixed frequency and an attention that
needs only scaling, causality, a sliding window and softcapping. A model outside of that would not fail:
it would answer wrongly. So a family is served only when it stands in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.modelstore.core.refusal import Refused, unsupported

FAMILIES: Mapping[str, str] = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
"""transformers' model_type -> the one class of it that is served."""

REARRANGED = frozenset({"mixtral", "qwen3_moe"})
"""Families whose tensors transformers stores under other names and shapes than it computes with."""

GGUF_FAMILIES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's general.architecture -> model_type, where the conversion loses nothing."""

FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})

_RECURRENT = "its layers are recurrent, so sequences in one flattened batch would mix"
_HYBRID = "some of its layers are recurrent or convolutional, so sequences in one flattened batch would mix"
_EXPERTS = "its mixture of experts was not checked; of those only mixtral and qwen3_moe are served"
_POSITIONS = "its positions are not rotary with fixed frequencies"
_SINKS = "its attention has sinks, which the engine does not have"
_LATENT = "its attention is latent (MLA), which the engine's cache does not hold"
_ENCODER_DECODER = "it is an encoder-decoder; only decoders are served"
_ENCODER = "it is an encoder and generates no text"
_MULTIMODAL = "it takes images or sound; import its language model alone"


def _each(cause: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), cause)


CAUSES: Mapping[str, str] = {
    **_each(_RECURRENT, "mamba mamba2 falcon_mamba rwkv recurrent_gemma xlstm"),
    **_each(_HYBRID, "jamba bamba zamba zamba2 falcon_h1 nemotron_h granitemoehybrid lfm2 lfm2_moe lfm3"),
    **_each(
        _HYBRID,
        "qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text minimax kimi_linear olmo_hybrid",
    ),
    **_each(_EXPERTS, "qwen2_moe olmoe granitemoe granitemoeshared phimoe dbrx jetmoe dots1"),
    **_each(_EXPERTS, "glm4_moe ernie4_5_moe llama4 llama4_text minimax_m2 hunyuan_v1_moe flex_olmo"),
    **_each(_SINKS, "gpt_oss"),
    **_each(_LATENT, "deepseek_v2 deepseek_v3 deepseek_v32 minicpm3 youtu"),
    **_each(
        _POSITIONS, "gpt2 gpt_neo gptj codegen opt bloom mpt gpt_bigcode xglm biogpt openai-gpt ctrl falcon"
    ),
    **_each(
        _ENCODER_DECODER,
        "t5 mt5 umt5 longt5 t5gemma bart mbart pegasus marian m2m_100 whisper led prophetnet",
    ),
    **_each(
        _ENCODER, "bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 mpnet modernbert"
    ),
    **_each(_ENCODER, "nomic_bert eurobert camembert layoutlm vit clip siglip"),
    **_each(
        _MULTIMODAL, "llava llava_next mistral3 pixtral gemma3 gemma3n gemma4 qwen2_vl qwen2_5_vl qwen3_vl"
    ),
    **_each(
        _MULTIMODAL, "paligemma idefics2 idefics3 smolvlm mllama internvl phi4_multimodal qwen2_audio voxtral"
    ),
}
"""transformers' model_type -> why it is refused, where more can be said than that it is unknown."""


def check_config(label: str, config: Mapping[str, Any]) -> None:
    """Raises Refused with MODEL_UNSUPPORTED for a config.json that the engine could not run exactly."""
    model_type = str(config.get("model_type") or "")
    named = config.get("architectures") or []
    architecture = str(named[0]) if isinstance(named, list) and named else model_type or "a nameless model"
    if not model_type:
        raise unsupported(label, architecture, "config.json has no model_type")
    cause = _why_not(config, model_type, architecture if named else "")
    if cause:
        raise unsupported(label, architecture, cause)


def check_gguf_architecture(label: str, architecture: str) -> str:
    """The model_type of a GGUF architecture. Raises Refused with MODEL_UNSUPPORTED."""
    if architecture in GGUF_FAMILIES:
        return GGUF_FAMILIES[architecture]
    cause = CAUSES.get(architecture)
    if cause is None:
        known = ", ".join(sorted(GGUF_FAMILIES))
        cause = f"GGUF files of {known} are converted; import the model's Hugging Face folder instead"
    raise unsupported(label, f"GGUF architecture {architecture!r}", cause)


def _why_not(config: Mapping[str, Any], model_type: str, architecture: str) -> str:
    if config.get("auto_map"):
        return (
            "config.json has an auto_map: the model brings code of its own (trust_remote_code), which is "
            "never run; remove auto_map if transformers' own implementation is meant"
        )
    if config.get("is_encoder_decoder"):
        return _ENCODER_DECODER
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return CAUSES.get(model_type) or f"model_type {model_type!r} is none of those checked: {known}"
    if architecture and architecture != FAMILIES[model_type]:
        return f"of model_type {model_type!r} only {FAMILIES[model_type]} is served"
    if config.get("quantization_config"):
        return "its weights are quantised; import the model in bfloat16, float16 or float32"
    if config.get("use_bidirectional_attention"):
        return "its attention is not causal"
    return _rope_problem(config) or _layer_problem(config)


def _rope_problem(config: Mapping[str, Any]) -> str:
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in FIXED_ROPE:
            known = ", ".join(sorted(FIXED_ROPE))
            return f"its rotary frequencies are {str(kind)!r}, which depend on the batch; fixed ones: {known}"
    return ""


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every statement about rotary positions: one for the model, or one for each kind of layer."""
    found: list[Mapping[str, Any]] = []
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            nested = [inner for inner in value.values() if isinstance(inner, Mapping)]
            found += nested or [value]
    return found


def _layer_problem(config: Mapping[str, Any]) -> str:
    layers = config.get("layer_types")
    others = {str(layer) for layer in layers} - ATTENTION_LAYERS if isinstance(layers, list) else set()
    if others:
        known = ", ".join(sorted(ATTENTION_LAYERS))
        return f"it has layers of type {', '.join(sorted(others))}; the engine runs {known}"
    return ""


def check_tokenizer_config(label: str, config: Mapping[str, Any]) -> None:
    """Raises Refused when the tokenizer wants code of its own."""
    if config.get("auto_map"):
        cause = (
            "tokenizer_config.json has an auto_map: its tokenizer is code (trust_remote_code), which is "
            "never run; save it as tokenizer.json"
        )
        raise Refused("MODEL_UNSUPPORTED", f"{label}: {cause}", architecture="tokenizer", cause=cause)
