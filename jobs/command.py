"""Shared by all commands: finding a recipe by name, parsing the command line over it, and errors as one sentence."""

import difflib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from cluster.runs.recipe import Recipe
from doge.common.config_tree import parse, read_yaml
from doge.common.errors import UserError
from doge.common.paths import plain_path
from doge.common.terminal import prepare_streams

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Command:
    """Options that every command has.

    Args:
        recipe: Name of a recipe in jobs/recipes, such as tiny or fast/tiny, or path of a YAML file.
        dry_run: Print the plan and start nothing.
        settings: Any key of the recipe.
    """

    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    recipe: str = "tiny"
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


T = TypeVar("T", bound=Command)


def recipe_names() -> list[str]:
    """The names of all recipes: those of jobs/recipes, then those of its folders, without what they have in common."""
    paths = [path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.yaml")]
    return [
        path.as_posix() for path in sorted(paths, key=lambda path: (len(path.parts), path)) if path.parts[0] != "data"
    ]


def find_recipe(name: str) -> Path:
    """Find the file of a recipe. Raises UserError that names the nearest recipe."""
    if name.endswith((".yaml", ".yml")):
        return Path(plain_path(name))
    names = recipe_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"There is no recipe {name}; the nearest is {nearest}, and there are {', '.join(names)}.")
    return RECIPES / f"{name}.yaml"


def main(command: type[T], run: Callable[[T], None], description: str | None) -> None:
    """Parse the command line, run the command and exit: status 0 is success, 1 an error, 130 an interruption."""
    prepare_streams()
    arguments = sys.argv[1:]
    status = 0
    try:
        default = command(settings=read_yaml(Recipe, find_recipe(_recipe_name(arguments))))
        described = f"{description or ''}\nRecipes: {', '.join(recipe_names())}."
        run(parse(command, default, arguments, described))
    except UserError as error:
        _tell(f"error: {error}")
        status = 1
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _tell("Interrupted: run the same command to resume.")
        status = 130
    finally:
        _flush_output()
    if status:
        sys.exit(status)


def _tell(sentence: str) -> None:
    with suppress(OSError):  # whoever listened is gone
        print(sentence, file=sys.stderr, flush=True)


def _flush_output() -> None:
    """Write what is left, so that Python need not, which would print a traceback where nobody reads any more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _recipe_name(arguments: list[str]) -> str:
    """Find the recipe whose values are the defaults of all other options."""
    for at, argument in enumerate(arguments):
        if argument == "--recipe" and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith("--recipe="):
            return argument.removeprefix("--recipe=")
    return Command.recipe
