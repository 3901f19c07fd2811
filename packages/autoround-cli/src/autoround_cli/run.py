"""`autoround run`: generate text with a checkpoint."""

from __future__ import annotations

import click

from autoround_cli.options import parse_dtype


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("prompt")
@click.option("--max_new_tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="A backend of `autoround backends`.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def run(checkpoint, prompt, max_new_tokens, device, backend, dtype, chat, trust_remote_code) -> None:
    """Continue PROMPT with a saved model, greedily."""
    import torch

    from autoround_core.evaluation import load_for_evaluation

    model, tokenizer = load_for_evaluation(
        checkpoint,
        device=device,
        backend=backend,
        dtype=parse_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    click.echo(tokenizer.decode(output[0], skip_special_tokens=True))
