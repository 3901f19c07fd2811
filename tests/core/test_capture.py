"""Capture: blocks run one after another, as captured, make what the model itself makes."""

from __future__ import annotations

import pytest
import torch
import transformers

from autoround_core.adapter import ModelView
from autoround_core.calibration_set import CalibrationSet
from autoround_core.capture import PLAIN_CALL, BlockCall, capture, head_inputs, is_batchable
from autoround_core.causal_lm import CausalLM
from autoround_core.errors import CalibrationError, UnsupportedError
from tiny_models import MODELS, WIDTH, token_ids

IDS = token_ids(samples=4, length=16)
ROWS = CalibrationSet(IDS, "given", len(IDS), 0)
UNTIED = [name for name, tiny in MODELS.items() if not tiny.tied]


def captured(view: ModelView, data: CalibrationSet = ROWS) -> tuple[torch.Tensor, tuple[BlockCall, ...]]:
    chain = capture(view, data)
    return chain.hidden, chain.calls


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
    hidden, calls = captured(view)
    assert [call.batchable for call in calls] == [MODELS[name].batchable] * len(calls)
    for rows in ([0, 1], [3, 1], [2]):
        truth = observe(view, IDS[rows])
        torch.testing.assert_close(hidden[rows], truth["first"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_blocks(view, calls, hidden, rows), truth["last"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNTIED)
def test_the_head_gets_what_the_model_gives_it(saved, name):
    view = view_of(saved(name))
    truth = observe(view, IDS)
    torch.testing.assert_close(head_inputs(view, ROWS, truth["last"]), truth["head"], rtol=1e-4, atol=1e-4)
    # it is the given states that are passed on, not the model's own
    other = head_inputs(view, ROWS, truth["last"].flip(0))
    torch.testing.assert_close(other, truth["head"].flip(0), rtol=1e-4, atol=1e-4)


def test_states_and_arguments_keep_the_model_dtype(saved):
    adapter = CausalLM()
    hidden, calls = captured(adapter.view(adapter.load(saved("gemma2"), trust_remote_code=False)))
    assert hidden.dtype == torch.bfloat16
    assert {leaf.dtype for call in calls for leaf in call.leaves if isinstance(leaf, torch.Tensor)} <= {
        torch.bfloat16, torch.bool, torch.int64}


def test_masks_differ_between_kinds_of_attention(saved):
    _, calls = captured(view_of(saved("gemma2")))
    masks = [call.arguments(torch.tensor([0]), torch.device("cpu"))[1]["attention_mask"] for call in calls]
    sliding, full = masks[0][0, 0] == 0, masks[1][0, 0] == 0
    distance = torch.arange(16)[:, None] - torch.arange(16)
    assert torch.equal(full, distance >= 0)
    assert torch.equal(sliding, (distance >= 0) & (distance < 4))
    assert masks[2] is masks[0]


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_arguments_that_all_samples_share_are_kept_once(saved, name):
    _, calls = captured(view_of(saved(name)))
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
        capture(view, CalibrationSet(token_ids(count, 64), "given", count, 0))
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
    hidden, calls = captured(view)
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
    hidden, calls = captured(view)
    # states of any dtype will do
    assert is_batchable(calls[0], view.blocks[0].module, hidden.float()) == MODELS[name].batchable


# --- what is left behind ------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(saved):
    view = view_of(saved("llama"))
    before = observe(view, IDS)
    hidden, _ = captured(view)
    head_inputs(view, ROWS, hidden)
    assert not any("forward" in vars(module) for module in view.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in view.model.modules())
    assert torch.equal(observe(view, IDS)["last"], before["last"])


def test_a_wrapped_forward_is_put_back(saved):
    view = view_of(saved("llama"))
    block = view.blocks[1].module
    wrapped = block.forward
    block.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    mine = block.forward
    capture(view, ROWS)
    assert block.forward is mine


def test_states_of_another_shape_are_cut_out_of_the_row_and_given_back():
    view = build("XLNetConfig", d_model=WIDTH, n_layer=2, n_head=4, d_inner=96)  # [tokens, samples, width]
    hidden, calls = captured(view)
    assert hidden.shape == (4, 16, WIDTH) and calls[0].shapes == ((16, 1, WIDTH),) * 4
    for row in (0, 3):
        seen = {}
        handle = view.blocks[-1].module.register_forward_hook(lambda _, args, output, seen=seen: seen.update(
            last=output[0]))
        view.model(input_ids=IDS[row : row + 1], use_cache=False)
        handle.remove()
        torch.testing.assert_close(run_blocks(view, calls, hidden, [row]), seen["last"].transpose(0, 1))


def test_samples_of_several_lengths_fill_the_beginnings_of_their_rows():
    shapes = ((3, WIDTH), (5, WIDTH))
    call = BlockCall(PLAIN_CALL.spec, [], returns_tuple=False, batchable=False, shapes=shapes)
    hidden = torch.zeros(2, 5, WIDTH)
    hidden[0, :3], hidden[1] = torch.randn(3, WIDTH), torch.randn(5, WIDTH)
    seen = []

    def block(states):
        seen.append(states.shape)
        return states + 1

    output = call.run(block, hidden, torch.arange(2))
    assert seen == list(shapes)
    assert torch.equal(output[0, :3], hidden[0, :3] + 1) and not output[0, 3:].any()
    assert torch.equal(output[1], hidden[1] + 1)
    # what a projector returns is as it is
    assert call.run(lambda states: states[:2, :8], hidden, torch.tensor([1])).shape == (1, 2, 8)


def test_what_a_model_adds_between_blocks_is_added_again(saved):
    view = view_of(saved("llama"))
    features = torch.zeros(len(IDS), 16, WIDTH)
    features[1, 3:5], features[3, 7] = torch.randn(2, WIDTH), torch.randn(WIDTH)

    def add(block, args):  # as Qwen3-VL does with features of the image
        return args[0] + features[given], *args[1:]

    handle = view.blocks[1].module.register_forward_pre_hook(add)
    forward, given = view.model.forward, []

    def remember(input_ids, **kwargs):
        given[:] = [int((IDS[:, : len(row)] == row).all(-1).nonzero()[0]) for row in input_ids]
        return forward(input_ids=input_ids, **kwargs)

    view.model.forward = remember
    chain = capture(view, ROWS)
    assert [sample for sample, *_ in chain.added[1]] == [1, 3] and set(chain.added) == {1}
    truth = observe(view, IDS)["last"]
    handle.remove()
    states = chain.hidden
    for index, (block, call) in enumerate(zip(view.blocks, chain.calls, strict=True)):
        states.copy_(call.run(block.module, states, torch.arange(len(IDS))))
        chain.enter(index + 1)
    torch.testing.assert_close(states, truth, rtol=1e-4, atol=1e-4)


# --- what is refused ----------------------------------------------------------------------------------------


def build(config_class: str, **options) -> ModelView:
    config = getattr(transformers, config_class)(**{"vocab_size": 128, "pad_token_id": None} | options)
    adapter = CausalLM()
    return adapter.view(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_blocks_that_run_in_rounds_are_refused():
    view = build("HrmTextConfig", hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_layers_per_stack=2)
    with pytest.raises(UnsupportedError, match="must run once, in order; this model ran 0, 1, 0, 1"):
        capture(view, ROWS)


def test_a_product_between_blocks_is_refused(saved):
    view = view_of(saved("llama"))
    view.blocks[1].module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    message = r"`model\.layers\.1` is not given what the block before it returned"
    with pytest.raises(UnsupportedError, match=message):
        capture(view, ROWS)


def test_a_token_that_the_model_does_not_know_is_refused(saved):
    with pytest.raises(CalibrationError, match="holds the token id 500, the model knows 0 to 127"):
        capture(view_of(saved("llama")), CalibrationSet(torch.full((1, 8), 500), "given", 1, 0))
