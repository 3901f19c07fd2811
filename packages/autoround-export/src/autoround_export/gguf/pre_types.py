"""How llama.cpp splits text before byte-pair merges: the names of `tokenizer.ggml.pre`, as data.

A tokenizer.json says its rules one after the other. Each is written here as one regular expression: a `Digits` step is
`\\p{N}`, a `ByteLevel` step with its own expression is GPT-2's. A name stands for such a chain, for whether whole words
skip the merges (`ignore_merges`), and for whether llama.cpp puts a BOS in front when the file does not say.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = "punctuation, contiguous"
DIGIT, NUMBER = r"\p{N}", r"\p{N}+"

_CL100K = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(contractions: str, digits: str) -> str:
    """Words cut where lower case is followed by upper case."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{_UPPER}*{_LOWER}+{contractions}|{before}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"


_O200K = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_KANJI = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_LETTERS = (
    r"\s?["
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
    "]+"
)
_DEEPSEEK_MARKS = r"\s?[!-/:-~！-／：-～‘-‟" + "\u3000-\u3002]+"
_BREAK = r"[\r\n]"
_ASIAN = "[一-龥\u0800-一가-\ud7ff]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_YOUTU = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
_SPACE_RUNS = "|".join([*(rf"\s{{{2**i}}}(?!\S)" for i in range(9, 1, -1)), r"\s{1,2}(?!\S)|\s{1}"])


@dataclass(frozen=True, slots=True)
class PreType:
    """One chain of rules and one name for it.

    ignore_merges, adds_bos: what llama.cpp takes from the name. model_types: Transformers models that this name was
    made for; among names of equal rules and flags the first is taken when no model type decides.
    """

    name: str
    rules: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    model_types: tuple[str, ...] = ()


PRE_TYPES = (
    PreType("llama-bpe", (_CL100K,), True, True, ("llama", "llama3", "mllama")),
    PreType("glm4", (_CL100K,), True, False, ("glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v", "glm4v_moe")),
    PreType("falcon-h1", (_CL100K,), True, True, ("falcon_h1",)),
    PreType("lfm2", (_CL100K,), True, True, ("lfm2", "lfm2_moe")),
    PreType("dbrx", (_CL100K,), model_types=("dbrx", "phi3", "olmo2", "olmo3", "granitemoehybrid")),
    PreType("smaug-bpe", (_CL100K,), model_types=("llama", "smollm3")),
    PreType("chatglm-bpe", (_CL100K,), model_types=("chatglm", "glm", "glm4")),
    PreType("qwen2", (_QWEN2,)),
    PreType("stablelm2", (_QWEN2,), model_types=("stablelm",)),
    PreType("hunyuan", (_QWEN2,), model_types=("hunyuan_v1_moe",)),
    PreType("solar-open", (_QWEN2,), model_types=("solar_open",)),
    PreType("grok-2", (_QWEN2,), model_types=("grok",)),
    PreType("qwen35", (_QWEN35,)),
    PreType("gpt-2", (GPT2,)),
    PreType("olmo", (GPT2,), model_types=("olmo", "olmoe")),
    PreType("mpt", (GPT2,), model_types=("mpt",)),
    PreType("phi-2", (GPT2,), model_types=("phi",)),
    PreType("exaone4", (GPT2,), model_types=("exaone4",)),
    PreType("jais", (GPT2,), model_types=("jais",)),
    PreType("smollm", (DIGIT, GPT2)),
    PreType("starcoder", (DIGIT, GPT2), model_types=("starcoder2", "gpt_bigcode")),
    PreType("command-r", (DIGIT, GPT2), model_types=("cohere", "cohere2")),
    PreType("refact", (DIGIT, GPT2), model_types=("granite", "granitemoe", "granitemoeshared", "refact")),
    PreType("exaone", (DIGIT, GPT2), model_types=("exaone",)),
    PreType("codeshell", (DIGIT, GPT2), model_types=("codeshell",)),
    PreType("minerva-7b", (DIGIT, GPT2), model_types=("mistral",)),
    PreType("mellum2", (DIGIT, GPT2), model_types=("mellum2",)),
    PreType("tekken", (_cased("", DIGIT),), True, True),
    PreType("gpt-4o", (_O200K,)),
    PreType("llama4", (_O200K,), model_types=("llama4", "llama4_text")),
    PreType("minimax-m2", (_O200K,), model_types=("minimax_m2",)),
    PreType("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", _O200K)),
    PreType("youtu", (_YOUTU, _cased(f"{_CONTRACTIONS}?", DIGIT)), True),
    PreType("deepseek-v3", (r"\p{N}{1,3}", _KANJI, _DEEPSEEK_WORDS)),
    PreType("hunyuan-dense", (r"\p{N}{1,3}", _KANJI, _DEEPSEEK_WORDS), model_types=("hunyuan_v1_dense",)),
    PreType("deepseek-llm", (_BREAK, _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _ASIAN, DIGIT)),
    PreType("deepseek-llm", (_BREAK, _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _ASIAN, NUMBER)),
    PreType("deepseek-coder", (_BREAK, r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, DIGIT)),
    PreType("falcon", (PUNCTUATION, GPT2, NUMBER, "[0-9][0-9][0-9]")),
    PreType("bloom", (_BLOOM,)),
    PreType("poro-chat", (_BLOOM,), model_types=("llama",)),
    PreType("viking", (_BLOOM, DIGIT)),
    PreType("bailingmoe", (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*"
                           r"|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreType("seed-coder", (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",)),
    PreType("exaone-moe", (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                           r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreType("jais-2", (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_SPACE_RUNS}",)),
    PreType("minicpm5", (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACE}"), True),
    PreType("ufakzeka", (rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACE}",)),
    PreType("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
)  # fmt: skip

# Other names that llama.cpp accepts: aliases of the above, and rules that no tokenizer.json is known to spell out.
OTHER_NAMES = (
    "default", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "jina-v5-nano", "spark2_5", "jina-es", "jina-de",
    "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert", "jina-v1-en", "jina-v2-code",
    "roberta-bpe", "deepseek-r1-qwen", "kormo", "f2llmv2", "glm5", "gpt3-finnish", "chameleon", "megrez", "kanana2",
    "talkie", "granite-embed-multi-97m", "cohere2moe", "superbpe", "trillion", "granite-docling", "bailingmoe2",
    "llada-moe", "hy_v4", "joyai-llm", "kimi-k2", "afmoe",
)  # fmt: skip
# Aliases by which strangers' files name rules of the table.
ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "midm-2.0": "llama-bpe", "deepseek-r1-qwen": "qwen2", "kormo": "qwen2", "f2llmv2": "qwen2", "megrez": "qwen2",
    "gigachat": "gpt-2", "a.x-4.0": "gpt-2", "mellum": "gpt-2", "trillion": "gpt-2", "granite-docling": "gpt-2",
    "glm5": "glm4", "gpt3-finnish": "bloom", "kanana2": "gpt-4o", "talkie": "gpt-4o", "cohere2moe": "tiny_aya",
    "bailingmoe2": "bailingmoe", "llada-moe": "bailingmoe", "hy_v4": "deepseek-v3", "joyai-llm": "deepseek-v3",
}  # fmt: skip
