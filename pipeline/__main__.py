"""argv -> configuration -> one command. `readcache <verb> --help` explains every option."""

import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.said import COMMANDS, build
from pipeline.show import Show, warn
from store.errors import Refused

ARGUMENTS = ("what", "a", "b")
"""fields that are said without their name"""

app = typer.Typer(name="readcache", help=__doc__, no_args_is_help=True, rich_markup_mode=None, add_completion=False,
                  pretty_exceptions_enable=False)  # fmt: skip


def _run(verb: str, said: dict[str, Any]) -> int:
    as_json, file, sets = said.pop("json"), said.pop("config"), said.pop("set")
    show, out = Show(to_stderr=as_json), sys.stdout
    status = 0
    # whatever a library prints must not end up in the document
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            config = build(COMMANDS[verb], file, sets or [], said)
            # the one lazy import: a verb loads what it needs, so that stage two runs where transformers does not
            document = importlib.import_module(f"pipeline.commands.{verb}").run(config, show)
            status = 1 if document.get("faults") else 0  # they are listed already
        except Refused as error:
            document, status = {"error": str(error)}, 2
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            text = f"{error.strerror or error}{place}; nothing that was finished is lost: see to it and run again"
            document, status = {"error": text}, 2
        except KeyboardInterrupt:
            document, status = {"error": "interrupted; what was finished is kept, run again to go on"}, 130
        except Exception as error:  # a mistake of ours: shown whole, and scripts still get their document
            traceback.print_exc()
            document, status = {"error": f"unexpected {type(error).__name__}: {error}"}, 1
    if "error" in document:
        warn(f"readcache {verb}: {document['error']}")
    if as_json:
        print(json.dumps(document, allow_nan=False), file=out)
    return status


def _options(model: type[BaseModel]) -> list[inspect.Parameter]:
    """One option a field of the configuration; its docstring, default and choices are the help."""
    options = [
        _option("config", Optional[Path], None, "YAML file with any of these options"),
        _option("set", Optional[list[str]], None, "key=value, or group.key=value; repeatable"),
        _option("json", bool, False, "print one JSON document on standard output, everything else on standard error"),
    ]
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        if name in ARGUMENTS:
            default = f" [default: {field.default}]" if field.default else ""
            argument = typer.Argument(help=f"{field.description}{default}", show_default=False)
            kind = Annotated[Optional[str], argument]
            options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
            continue
        flag = field.annotation is bool
        default = "" if field.default in (None, PydanticUndefined) or flag else f" [default: {field.default}]"
        options.append(_option(name, Optional[bool] if flag else Optional[str], None, f"{field.description}{default}"))
    return options


def _option(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    flag = kind in (bool, Optional[bool])
    metavar = None if flag else name.upper()
    option = typer.Option(f"--{name.replace('_', '-')}", help=text, metavar=metavar, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _command(verb: str) -> Callable[..., None]:
    model = COMMANDS[verb]

    def command(**said: Any) -> None:
        raise typer.Exit(_run(verb, said))

    parameters = _options(model)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    groups = [f"{name}.{key}: {inner.description} [default: {inner.default}]"
              for name, field in model.model_fields.items() if isinstance(field.default, BaseModel)
              for key, inner in type(field.default).model_fields.items()]  # fmt: skip
    command.__doc__ = (model.__doc__ or "") + ("\n\n\b\nWith --set or in the YAML file:\n" + "\n".join(groups) if groups else "")
    return command


for _verb in COMMANDS:
    app.command(_verb)(_command(_verb))


def main(argv: list[str] | None = None) -> None:
    """The command `readcache`: exit code 0, 2 for what the user can mend, 1 for what only we can."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    words = sys.argv[1:] if argv is None else argv
    try:
        status = app(args=words, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors have it: an unknown verb or option
            raise
        text, status = " ".join(error.format_message().split()), 2
        warn(error.format_message() if len(words) < 1 else f"readcache: {text}; --help lists what there is")
        if "--json" in words:
            print(json.dumps({"error": text}))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
