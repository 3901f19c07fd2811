"""Capture: blocks run one after another, as captured, make what the model itself makes."""

from __future__ import annotations

import pytest
import torch
import transformers

from autoround_core.adapter import ModelView
from autoround_core.capture import BlockCall, capture, head_inputs, is_batchable
from autoround_core.causal_lm import CausalLM
from autoround_core.errors import CalibrationError, UnsupportedError
from tiny_models import MODELS, WIDTH, token_ids

IDS = token_ids(samples=4, length=16)
UNTIED = [name for name, tiny in MODELS.items() if not tiny.tied]


def view_of(path) -> ModelView:
    """In float32, so that a wrong mask is not lost among roundings."""
    adapter = CausalLM()
    return adapter.view(adapter.load(path, trust_remote_code=False).float())


@torch.no_grad()
def observe(view: ModelView, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters and leaves the blocks, and enters the head, while the model runs all samples together."""
    seen: dict[str, torch.Tensor] = {}
    blocks = [block.module for block in view.blocks]
    handles = [
        blocks[0].register_forward_hook(lambda _, args, kwargs, output: seen.update(
            first=args[0] if args else kwargs["hidden_states"]), with_kwargs=True),
        blocks[-1].register_forward_hook(lambda _, args, output: seen.update(
            last=output if isinstance(output, torch.Tensor) else output[0])),
    ]
    head = view.model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _, args: seen.update(head=args[0])))
    view.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def run_blocks(
    view: ModelView, calls: list[BlockCall], hidden: torch.Tensor, rows: list[int]
) -> torch.Tensor:
    states = hidden[rows]
    for block, call in zip(view.blocks, calls, strict=True):
        states = call.run(block.module, states, torch.tensor(rows))
    return states


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_as_captured_make_what_the_model_makes(saved, name):
    view = view_of(saved(name))
    hidden, calls = capture(view, IDS)
    assert [call.batchable for call in calls] == [MODELS[name].batchable] * len(calls)
    for rows in ([0, 1], [3, 1], [2]):
        truth = observe(view, IDS[rows])
        torch.testing.assert_close(hidden[rows], truth["first"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_blocks(view, calls, hidden, rows), truth["last"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNTIED)
def test_the_head_gets_what_the_model_gives_it(saved, name):
    view = view_of(saved(name))
    truth = observe(view, IDS)
    torch.testing.assert_close(head_inputs(view, IDS, truth["last"]), truth["head"], rtol=1e-4, atol=1e-4)
    # it is the given states that are passed on, not the model's own
    other = head_inputs(view, IDS, truth["last"].flip(0))
    torch.testing.assert_close(other, truth["head"].flip(0), rtol=1e-4, atol=1e-4)


def test_states_and_arguments_keep_the_model_dtype(saved):
    adapter = CausalLM()
    hidden, calls = capture(adapter.view(adapter.load(saved("gemma2"), trust_remote_code=False)), IDS)
    assert hidden.dtype == torch.bfloat16
    assert {leaf.dtype for call in calls for leaf in call.leaves if isinstance(leaf, torch.Tensor)} <= {
        torch.bfloat16, torch.bool, torch.int64}


def test_masks_differ_between_kinds_of_attention(saved):
    _, calls = capture(view_of(saved("gemma2")), IDS)
    masks = [call.arguments(torch.tensor([0]), torch.device("cpu"))[1]["attention_mask"] for call in calls]
    sliding, full = masks[0][0, 0] == 0, masks[1][0, 0] == 0
    distance = torch.arange(16)[:, None] - torch.arange(16)
    assert torch.equal(full, distance >= 0)
    assert torch.equal(sliding, (distance >= 0) & (distance < 4))
    assert masks[2] is masks[0]


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_arguments_that_all_samples_share_are_kept_once(saved, name):
    _, calls = capture(view_of(saved(name)), IDS)
    tensors = [leaf for call in calls for leaf in call.leaves if isinstance(leaf, torch.Tensor)]
    assert tensors and all(tensor.shape[0] == 1 for tensor in tensors)
    # and the blocks share them: cosines, sines, positions and masks of two kinds of layers at most
    assert len({tensor.data_ptr() for tensor in tensors}) <= 7
    kinds = {type(leaf) for call in calls for leaf in call.leaves}
    assert all(kind is torch.Tensor or kind.__module__ == "builtins" for kind in kinds)  # none is per sample


def test_blocks_are_computed_for_a_few_tokens_only(saved):
    view, tokens = view_of(saved("llama")), []

    def count_tokens(_, args, __):
        tokens.append(args[0].shape[:2].numel())

    handles = [block.module.mlp.register_forward_hook(count_tokens) for block in view.blocks]
    few, many = [], []
    for count, seen in ((2, few), (4, many)):
        capture(view, token_ids(count, 64))
        seen += tokens
        tokens.clear()
    # 32 tokens through each of two blocks; one block of a kind with two samples, alone and together
    assert few == many == [32, 32, 64, 64, 128]
    for handle in handles:
        handle.remove()


# --- batching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_samples_that_do_not_run_together_run_one_by_one(saved, name):
    view = view_of(saved(name))
    hidden, calls = capture(view, IDS)
    sizes = []
    handle = view.blocks[0].module.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    calls[0].run(view.blocks[0].module, hidden, torch.arange(4))
    handle.remove()
    assert sizes == ([4] if MODELS[name].batchable else [1, 1, 1, 1])


@pytest.mark.parametrize("name", ["bloom", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batching_is_tried_in_the_dtype_of_the_block(saved, name, dtype):
    adapter = CausalLM()
    view = adapter.view(adapter.load(saved(name), trust_remote_code=False).to(dtype))
    hidden, calls = capture(view, IDS)
    # states of any dtype will do
    assert is_batchable(calls[0], view.blocks[0].module, hidden.float()) == MODELS[name].batchable


# --- what is left behind ------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(saved):
    view = view_of(saved("llama"))
    before = observe(view, IDS)
    hidden, _ = capture(view, IDS)
    head_inputs(view, IDS, hidden)
    assert not any("forward" in vars(module) for module in view.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in view.model.modules())
    assert torch.equal(observe(view, IDS)["last"], before["last"])


def test_a_wrapped_forward_is_put_back(saved):
    view = view_of(saved("llama"))
    block = view.blocks[1].module
    wrapped = block.forward
    block.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    mine = block.forward
    capture(view, IDS)
    assert block.forward is mine


# --- what is refused ----------------------------------------------------------------------------------------


def build(config_class: str, **options) -> ModelView:
    config = getattr(transformers, config_class)(**{"vocab_size": 128, "pad_token_id": None} | options)
    adapter = CausalLM()
    return adapter.view(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_blocks_that_run_in_rounds_are_refused():
    view = build("HrmTextConfig", hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_layers_per_stack=2)
    with pytest.raises(UnsupportedError, match="must run once, in order; this model ran 0, 1, 0, 1"):
        capture(view, IDS)


def test_states_of_another_shape_are_refused():
    view = build("XLNetConfig", d_model=WIDTH, n_layer=2, n_head=4, d_inner=96)
    message = r"states of shape \[16, 1, 64\] for one sample, expected \[1, tokens, width\]"
    with pytest.raises(UnsupportedError, match=message):
        capture(view, IDS)


def test_work_between_blocks_is_refused(saved):
    view = view_of(saved("llama"))
    view.blocks[1].module.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    message = r"`model\.layers\.1` is not given what the block before it returned"
    with pytest.raises(UnsupportedError, match=message):
        capture(view, IDS)


def test_a_token_that_the_model_does_not_know_is_refused(saved):
    with pytest.raises(CalibrationError, match="holds the token id 500, the model knows 0 to 127"):
        capture(view_of(saved("llama")), torch.full((1, 8), 500))
