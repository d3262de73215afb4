"""`crystalcoder serve`: a Hugging Face checkpoint behind OpenAI's HTTP interface, by vLLM or by transformers' server.

crystalcoder serve DIR --port 8000
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "DIR", "messages": [{"role": "user", "content": "Hello"}]}'
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.errors import InputError, exits_on_bad_input
from finetune.jinja import jinja_template
from finetune.templates import CRYSTALCHAT, template_beside
from tools.hf_checkpoint import Device, Directory, Dtype, DtypeOption, load_checkpoint, require_files

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

# What transformers' server imports, beyond what this project needs anyway.
NEEDED = ("fastapi", "uvicorn", "openai")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@exits_on_bad_input
def serve(
    context: typer.Context,
    directory: Directory,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine's")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen at")] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model [default: DIR's last part]")] = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="auto: vLLM where it is installed")
    ] = "auto",
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve a checkpoint with OpenAI's interface (/v1/chat/completions and others) until Ctrl-C.

    Options that it does not know go to `vllm serve`.
    """
    require_files(directory)
    name = name or directory.resolve().name
    vllm = shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if engine == "auto":
        engine = "vllm" if vllm else "transformers"
    if engine == "vllm":
        if vllm is None:
            raise InputError("--engine vllm: vLLM is not installed: pip install vllm, or leave out --engine")
        if device is not None:
            raise InputError("--device: vLLM takes the GPUs of CUDA_VISIBLE_DEVICES: set that instead")
        command = vllm_command(vllm, directory, name, host, port, dtype.value)
        _refuse_used_port(host, port)
        os.execv(vllm, [*command, *context.args])
    if context.args:
        raise InputError(f"unknown argument {context.args[0]!r}: only vLLM takes others than --help lists")
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise InputError(
            f"serving needs {', '.join(missing)}: install them with pip install 'crystalcoder[serve]', or install vllm"
        )
    _refuse_used_port(host, port)
    model, tokenizer = load_checkpoint(directory, device=device, dtype=dtype.value)
    prepare_model(model, tokenizer, directory)
    print(f"serving {name} at http://{host}:{port}/v1 with transformers; Ctrl-C ends it", flush=True)
    start_server(model, tokenizer, name, host, port)


def vllm_command(vllm: str, directory: Path, name: str, host: str, port: int, dtype: str) -> list[str]:
    """`vllm serve` for this checkpoint. vLLM has no CrystalCoder of its own: it runs the code beside the weights.

    Raises:
        InputError: the directory lacks that code, or speaks a chat template that vLLM could not know of.
    """
    if not (directory / "modeling_crystalcoder.py").is_file():
        raise InputError(
            f"{directory}: holds no modeling_crystalcoder.py, which vLLM needs: copy the *_crystalcoder*.py of "
            "Megatron-LM/CrystalCoder there, or choose --engine transformers"
        )
    if template_beside(directory) != CRYSTALCHAT and not (directory / "chat_template.jinja").is_file():
        raise InputError(
            f"{directory}: has a chat template of its own, but no chat_template.jinja for vLLM: "
            "write it again with crystalcoder finetune export, or choose --engine transformers"
        )
    command = [vllm, "serve", str(directory), "--trust-remote-code", "--served-model-name", name]
    command += ["--host", host, "--port", str(port)]
    return command if dtype == "auto" else [*command, "--dtype", dtype]


def prepare_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Give the tokenizer the chat template, and the model where to stop and how OpenAI's interface samples."""
    from transformers import GenerationConfig

    template = template_beside(directory)
    tokenizer.chat_template = jinja_template(template, sorted(tokenizer.get_added_vocab()))
    ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, *template.stops])
    # Temperature 1 unless a request says otherwise; 0 becomes greedy. top_k: no cut where OpenAI's interface has none.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.eos_token_id,
    )
    model.generate = _within_context(model)


def _within_context(model: Any) -> Any:
    """`model.generate` that ends where the context does, and answers a longer prompt with HTTP status 400."""
    from fastapi import HTTPException

    generate, positions = model.generate, model.config.n_positions

    def bounded(*, input_ids: Any, generation_config: Any, **others: Any) -> Any:
        room = positions - input_ids.shape[-1]
        if room < 1:
            raise HTTPException(
                400, f"the prompt has {input_ids.shape[-1]} tokens, the context {positions}: shorten it"
            )
        generation_config.max_new_tokens = min(generation_config.max_new_tokens or room, room)
        return generate(input_ids=input_ids, generation_config=generation_config, **others)

    return bounded


def start_server(model: Any, tokenizer: Any, name: str, host: str, port: int, *, background: bool = False) -> Any:
    """Run transformers' server on a model in memory; with `background`, in a thread, until its `kill_server()`.

    That server builds only the classes that transformers itself has, so it is given a manager that holds the model.

    Raises:
        InputError: the installed transformers has another server.
    """
    try:
        server = import_module("transformers.cli.serve")
        managers = import_module("transformers.cli.serving.model_manager")
        Manager: Any = managers.ModelManager
    except (ImportError, AttributeError) as error:
        raise InputError(f"the installed transformers has no server to use ({error}): upgrade it") from None

    class OneModel(Manager):
        def load_model_and_processor(self, *which: Any, **how: Any) -> tuple[Any, Any]:
            return model, tokenizer

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id  # without the "@main" of a hub's revision

        @staticmethod
        def get_gen_models(*where: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "crystalcoder"}]

    vars(managers)["ModelManager"] = OneModel
    try:
        return server.Serve(force_model=name, host=host, port=port, non_blocking=background)
    finally:
        vars(managers)["ModelManager"] = Manager


def _refuse_used_port(host: str, port: int) -> None:
    """Before a model is loaded, which may take minutes."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from None


def main(arguments: list[str]) -> None:
    """What `crystalcoder serve` runs."""
    app(args=arguments, prog_name="crystalcoder serve")


if __name__ == "__main__":
    app()
