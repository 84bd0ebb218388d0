"""Which room may import which: jobs -> tune -> cluster -> data_pipelines -> doge, and the order inside each."""

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import pytest
from source_tree import Import, all_imports, imports, modules, room

# From the bottom to the top. A room imports itself, the rooms of its own row and of the rows above it in this table.
ORDER = {
    "": [["doge"], ["data_pipelines"], ["cluster"], ["tune"], ["jobs"], ["benchmarks"]],
    "doge": [
        ["common"],
        ["model"],
        ["tokenizer", "training", "conversion", "generation"],
        ["post_training", "evaluation", "reporting"],
        ["chat", "serving"],
    ],
    "data_pipelines": [["sources", "formats"], ["tokenizing"], ["order"], ["prepare"]],
    "cluster": [["machines"], ["elastic"], ["accounts"], ["workloads"], ["runs"], ["chaos"]],
}

# A trailing dot names everything in the package. Decisions are functions of their arguments: no processes, no tensors.
PURE = (
    "doge.common.config_tree",
    "doge.common.errors",
    "doge.common.words",
    "doge.training.schedule",
    "data_pipelines.formats.",
    "data_pipelines.order.",
    "data_pipelines.tokenizing.packing",
    "cluster.accounts.",
    "cluster.chaos.disturbances",
    "cluster.elastic.decisions.",
    "cluster.elastic.events",
    "cluster.runs.journal",
    "cluster.runs.run_events",
    "cluster.workloads.pace",
    "cluster.workloads.shares",
)


def level(package: str, place: str) -> int:
    rows = [number for number, row in enumerate(ORDER[package]) if place in row]
    assert rows, f"{package or 'the project'} has a room {place} that has no place in ORDER"
    return rows[0]


def is_ours(target: str) -> bool:
    return target.split(".")[0] in {name for row in ORDER[""] for name in row}


def goes_up(found: Import) -> bool:
    """Whether an import names a room above the importer's; a package's own `__init__` is above all of its rooms."""
    (package, *place), (target, *target_place) = room(found.importer), room(found.target)
    if package != target:
        return level("", target) > level("", package)
    if package not in ORDER or not place:
        return False
    return not target_place or level(package, target_place[0]) > level(package, place[0])


def listed(offences: Iterable[object]) -> str:
    return "\n".join(map(str, offences))


def test_no_import_goes_up():
    offences = [found for found in all_imports() if is_ours(found.target) and goes_up(found)]
    assert not offences, listed(offences)


def test_every_import_of_ours_names_a_module():
    offences = [found for found in all_imports() if is_ours(found.target) and found.target not in modules()]
    assert not offences, listed(offences)


def test_decoding_needs_nothing_of_training():
    """So that DeepSpeed is not imported to generate text."""
    offences = [
        found
        for found in all_imports()
        if room(found.importer) == ("doge", "generation") and room(found.target) == ("doge", "training")
    ]
    assert not offences, listed(offences)


def test_ray_is_known_to_prepare_and_what_is_above_alone():
    below = [name for name in modules() if name.startswith(("doge", "data_pipelines"))]
    offences = [
        found
        for name in below
        if name != "data_pipelines.prepare"
        for found in imports(name)
        if found.target.split(".")[0] == "ray"
    ]
    assert not offences, listed(offences)


def pure_modules() -> list[str]:
    return [name for name in modules() if name in PURE or f"{name}.".startswith(tuple(p for p in PURE if p[-1] == "."))]


@pytest.mark.parametrize("module", pure_modules())
def test_a_pure_module_needs_neither_ray_nor_torch(module):
    """Not in a function of its own either, and not by way of another module of ours."""
    offences = [found for found in imports(module) if is_heavy(found.target) and found.when != "for types"]
    assert not offences, listed(offences)
    way = way_to_heavy(module)
    assert not way, " -> ".join(way)


def way_to_heavy(module: str) -> list[str]:
    """The shortest chain of imports that run when ``module`` is imported, up to a heavy one; empty if there is none."""
    ways = {module: [module]}
    for name in (waiting := [module]):
        for found in imports(name):
            if found.when == "at import":
                if is_heavy(found.target):
                    return [*ways[name], found.target]
                for target in with_parents(found.target):
                    if target in modules() and target not in ways:
                        ways[target] = [*ways[name], target]
                        waiting.append(target)
    return []


def is_heavy(target: str) -> bool:
    return target.split(".")[0] in ("ray", "torch", "transformers", "deepspeed")


def with_parents(target: str) -> list[str]:
    """A module and the packages around it, which Python imports first."""
    parts = target.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions count: they hide a circle and do not end it. Those for types alone do not."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in all_imports():
        if found.target in modules() and found.when != "for types" and found.target != found.importer:
            graph[found.importer].add(found.target)
    check_no_circle(graph)


def test_rooms_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        here, there = room(found.importer), room(found.target)
        if found.target in modules() and here != there and len(here) == len(there) == 2:
            graph.setdefault(".".join(here), set()).add(".".join(there))
    check_no_circle(graph)


def check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
