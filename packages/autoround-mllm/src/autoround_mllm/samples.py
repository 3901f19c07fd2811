"""From conversations about images to equal rows of tokens, each with the pixels that belong to it.

A conversation is written as the model's chat template does, its processor makes tokens and pixels of it, and the rows
are padded on the right to the longest, as the processor itself would pad a batch. A row that is too long is cut; but an
image must be whole, so one whose images end beyond the cut is left out, and the error for too few rows says what length
would hold them. Text is packed into full rows by `autoround_core.calibration`, and stands beside the others.

A chat template is a stranger's program: one writes only parts, another only plain strings, and what it does not know it
leaves out without a word. So what it wrote is compared with what it was given.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from autoround_core.calibration import CalibrationSet, load_calibration
from autoround_core.documents import first_line, parse_datasets, share_rows
from autoround_core.errors import AutoRoundError, CalibrationError, UnsupportedError, UsageError
from autoround_mllm.conversation import Conversation
from autoround_mllm.conversations import Source, conversations, given_source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One row. ids: int64 [T]. mask: bool [T]. extras: what else the model is given. images: how many.

    along: the names of the extras whose second dimension is T.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    along: tuple[str, ...] = ()
    images: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one data set gives. too_long: samples left out, without their extras."""

    samples: Sequence[Sample]
    documents: int
    skipped: int = 0
    unused: int = 0
    too_long: Sequence[Sample] = ()


def image_text_samples(
    dataset: str | Iterable[Any], processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase,
    *, nsamples: int, seqlen: int, seed: int = 42, skip_bad_samples: bool = False,
) -> CalibrationSet:
    """Make `nsamples` rows of up to `seqlen` tokens, with their images.

    dataset: a specification (see `autoround_core.documents`; `synthetic` is the drawn set), or an iterable of
    Conversations or of rows as a data set has them. A data set whose first rows are text without images is packed as
    core does. skip_bad_samples: count what cannot be read and take the next. seed: the order of samples of several data
    sets. `documents` of the result counts the conversations read, those too long for `seqlen` among them. Raises
    UsageError for what cannot be meant, CalibrationError for data that cannot be read or is too small.
    """
    for name, value, least in (("nsamples", nsamples, 1), ("seqlen", seqlen, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value}")
    named = isinstance(dataset, str)
    sources = [open_source(spec) for spec in parse_datasets(dataset)] if named else [given_source(dataset)]
    if all(source.is_text for source in sources):
        given = dataset if named else sources[0].rows
        return load_calibration(given, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed)
    parts = []
    for source, wanted in zip(sources, share_rows([source.spec for source in sources], nsamples), strict=True):
        if source.is_text:
            parts.append(_text_part(source, tokenizer, wanted, seqlen))
            continue
        part = _image_part(source, processor, tokenizer, wanted, seqlen, skip_bad_samples)
        _check_enough(source, part, wanted, seqlen, _image_ids(processor, tokenizer), alone=len(sources) == 1)
        parts.append(part)
    samples = [sample for part in parts for sample in part.samples]
    if len(parts) > 1:
        random.Random(seed).shuffle(samples)
    return _joined(samples, parts, dataset if named else sources[0].spec.name, tokenizer)


def encode(conversation: Conversation, processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The processor's tokens and tensors for a conversation. Raises CalibrationError if it refuses."""
    template = _template(processor, tokenizer)
    if template is None:
        keywords = _plain(conversation, processor)
    else:
        text, bos = _written(conversation, processor, template), tokenizer.bos_token
        # as apply_chat_template does when it tokenizes: a template may have written it
        keywords = {"text": [text], **({"add_special_tokens": False} if bos and text.startswith(bos) else {})}
    if conversation.images:
        keywords["images"] = [list(conversation.images)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # how tensors and arrays meet inside Transformers
            made = dict(processor(**keywords, return_tensors="pt"))
    except AutoRoundError:
        raise
    except Exception as error:  # remote code and image libraries may raise anything
        raise CalibrationError(f"the processor refuses {conversation.where}: {first_line(error)}") from error
    ids = made.pop("input_ids")
    mask = made.pop("attention_mask", torch.ones_like(ids))
    made.pop("labels", None)  # a loss that nobody asked for would be computed
    strange = next((name for name, value in made.items() if not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        raise UnsupportedError(f"{type(processor).__name__} gives `{strange}`, which is no tensor, and cannot be used")
    # not by the shape alone: an image may have as many patches as there are tokens
    fixed = processor.image_processor.model_input_names
    along = tuple(name for name, value in made.items() if value.shape[:2] == ids.shape and name not in fixed)
    return Sample(ids[0], mask[0].bool(), made, along, len(conversation.images))


def padded(sample: Sample, length: int, pad_id: int) -> Sample:
    """A sample of `length` tokens: cut, or padded on the right as a processor pads.

    Extras along the tokens get zeros; those with more dimensions say which images a token sees, and repeat their last
    row, because tokens at the end see what the last one saw.
    """
    more = length - len(sample.ids)
    changed = {}
    for name in sample.along:
        value = sample.extras[name][:, :length]
        last = value[:, -1:] if value.dim() > 2 else torch.zeros_like(value[:, -1:])
        changed[name] = torch.cat([value, last.expand(-1, max(more, 0), *value.shape[2:])], dim=1)
    ids = torch.cat([sample.ids[:length], sample.ids.new_full((max(more, 0),), pad_id)])
    mask = torch.cat([sample.mask[:length], sample.mask.new_zeros(max(more, 0))])
    return replace(sample, ids=ids, mask=mask, extras={**sample.extras, **changed})


def _joined(
    samples: list[Sample], parts: list[_Part], source: str, tokenizer: PreTrainedTokenizerBase
) -> CalibrationSet:
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    longest = max(len(sample.ids) for sample in samples)
    samples = [padded(sample, longest, pad_id) for sample in samples]
    mask = torch.stack([sample.mask for sample in samples])
    return CalibrationSet(
        torch.stack([sample.ids for sample in samples]), source,
        documents=sum(part.documents for part in parts), unused_tokens=sum(part.unused for part in parts),
        mask=None if mask.all() else mask, extras=tuple(sample.extras for sample in samples),
        images=sum(sample.images for sample in samples), skipped=sum(part.skipped for part in parts),
    )


def _text_part(source: Source, tokenizer: PreTrainedTokenizerBase, wanted: int, seqlen: int) -> _Part:
    made = load_calibration(str(replace(source.spec, num=None)), tokenizer, nsamples=wanted, seqlen=seqlen)
    rows = [Sample(row, torch.ones_like(row).bool()) for row in made.input_ids]
    return _Part(rows, made.documents, unused=made.unused_tokens)


def _image_part(
    source: Source, processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase,
    wanted: int, seqlen: int, skip_bad: bool,
) -> _Part:
    """Up to `wanted` samples of one data set, cut to `seqlen` but not yet padded."""
    spec, errors, samples, too_long = source.spec, [], [], []
    if spec.concat:
        raise UsageError(f"`{spec.name}` holds conversations about images; `concat` is for text, leave it out")
    if spec.templated and _template(processor, tokenizer) is None:
        advice = "leave apply_chat_template and system_prompt out"
        raise CalibrationError(f"dataset `{spec.name}`: the processor has no chat template; {advice}")
    patience = 8 * wanted + 64  # an endless stream of which nothing can be used must come to an end

    def skip(error: CalibrationError) -> None:
        if not skip_bad:
            raise error
        errors.append(error)
        if len(errors) > patience:
            raise CalibrationError(f"{len(errors)} samples of `{spec.name}` cannot be used; the last: {error}")

    image_ids = _image_ids(processor, tokenizer)
    for conversation in conversations(source, skip):
        try:
            sample = encode(conversation, processor, tokenizer)
        except CalibrationError as error:
            skip(error)
            continue
        if len(sample.ids) > seqlen and _needed(sample, image_ids) > seqlen:
            too_long.append(replace(sample, extras={}, along=()))  # its pixels are of no use any more
        else:
            samples.append(padded(sample, min(len(sample.ids), seqlen), 0))
        if len(samples) == wanted or len(too_long) > patience:
            break
    return _Part(samples, len(samples) + len(too_long), len(errors), too_long=too_long)


def _check_enough(
    source: Source, part: _Part, wanted: int, seqlen: int, image_ids: torch.Tensor, *, alone: bool
) -> None:
    count, name = len(part.samples), source.spec.name
    if count == wanted:
        return
    if not (part.documents or part.skipped):
        raise CalibrationError(f"calibration set `{name}` is empty")
    message, advice = f"`{name}` gives {count} samples of up to {seqlen} tokens, {wanted} were asked", "add data"
    if part.skipped:
        message += f"; {part.skipped} could not be read"
    if part.too_long:
        needed = sorted(_needed(sample, image_ids) for sample in part.too_long)
        largest = max(int(torch.isin(sample.ids, image_ids).sum()) for sample in part.too_long)
        message += f"; the images of {len(needed)} samples did not fit, they take up to {largest} tokens"
        missing = wanted - count
        enough = f"{needed[missing - 1]} for enough of them, " if missing < len(needed) else ""
        advice = f"pass --seqlen {enough}{needed[-1]} for all{'' if missing <= len(needed) else ', and add data'}"
    fewer = f", or pass {'--nsamples ' if alone else ':num='}{count}" if count else ""
    raise CalibrationError(f"{message}: {advice}{fewer}")


def _needed(sample: Sample, image_ids: torch.Tensor) -> int:
    """How many tokens hold all images of a sample."""
    found = torch.isin(sample.ids, image_ids).nonzero()
    # a processor that does not say which tokens are an image's may have any of them
    return int(found[-1]) + 1 if len(found) else len(sample.ids) * bool(sample.images)


def _image_ids(processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The tokens that stand for images, int64; none if the processor does not say."""
    ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return torch.tensor([i for i in ids if i is not None and i != tokenizer.unk_token_id], dtype=torch.int64)


def _template(processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> str | None:
    found = [getattr(owner, "chat_template", None) for owner in (processor, tokenizer)]
    found = [template.get("default") if isinstance(template, Mapping) else template for template in found]
    return found[0] or found[1]


def _placeholder(processor: ProcessorMixin) -> str | None:
    """What stands for an image in a prompt; None if the processor does not say."""
    token = getattr(processor, "image_token", None)
    around = (getattr(processor, f"vision_{end}_token", None) or "" for end in ("start", "end"))
    return token.join(around) if token else None


def _written(conversation: Conversation, processor: ProcessorMixin, template: str) -> str:
    """The conversation as the chat template writes it, with all of its texts and images."""
    failure = "it leaves out text or images"
    for messages in _forms(conversation, _placeholder(processor)):
        try:
            text = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # a template may raise anything
            failure = first_line(error)
            continue
        if _is_complete(text, conversation, processor):
            return text
    raise CalibrationError(f"the chat template cannot write {conversation.where}: {failure}")


def _forms(conversation: Conversation, placeholder: str | None) -> Iterator[list[dict[str, Any]]]:
    """Messages of parts; the system's as a string; those without images as strings; all as strings."""
    messages = conversation.messages
    strings = [_as_string(message, placeholder or "") for message in messages]
    with_image = [any(part["type"] == "image" for part in message["content"]) for message in messages]
    yield list(messages)
    yield [string if string["role"] == "system" else m for m, string in zip(messages, strings, strict=True)]
    yield [m if seen else string for m, string, seen in zip(messages, strings, with_image, strict=True)]
    if placeholder or not conversation.images:
        yield strings


def _as_string(message: Mapping[str, Any], placeholder: str) -> dict[str, Any]:
    parts = (part["text"] if part["type"] == "text" else placeholder for part in message["content"])
    return {**message, "content": "".join(parts)}


def _is_complete(text: str, conversation: Conversation, processor: ProcessorMixin) -> bool:
    tokens = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    counts = [text.count(token) for token in tokens if token]
    if counts and len(conversation.images) not in counts:
        return False
    if any(str(message["content"]) in text for message in conversation.messages):  # it took a list for a string
        return False
    said = [part["text"].strip() for m in conversation.messages for part in m["content"] if part["type"] == "text"]
    # only the last line: templates trim, and some leave out the thoughts before an answer
    return all(each.split("\n")[-1].strip() in text for each in said)


def _plain(conversation: Conversation, processor: ProcessorMixin) -> dict[str, Any]:
    """The prompt of a model without a chat template: its images, then the texts as lines."""
    placeholder, answer = _placeholder(processor), {}
    if placeholder is None:
        given = f"{type(processor).__name__} has neither a chat template nor an image token"
        raise UnsupportedError(f"{given}; give the model a chat template")
    texts = [_as_string(message, "")["content"] for message in conversation.messages]
    asked = inspect.signature(type(processor).__call__).parameters
    # a prefix model sees all of a prompt at once; what it is to say is given apart
    if "suffix" in asked and conversation.messages[-1]["role"] == "assistant":
        answer = {"suffix": [texts.pop()]}
    return {"text": [placeholder * len(conversation.images) + "\n".join(text for text in texts if text)], **answer}
