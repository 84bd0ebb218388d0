import pytest

from doge.reporting import plots

NAMES = ["cost$_$x", "a$b", "$\\frac$", "under_score", "back\\slash", "100% #1", "日本語", "_hidden"]


@pytest.mark.parametrize("name", NAMES)
def test_a_plots_texts_are_literal(name, tmp_path, recwarn):
    plots.plot_losses(tmp_path / "loss.png", [(1, 2.0), (2, 1.0)], [(2, 1.5)], {name: 1.7}, name)
    lanes = {"groups": {name: [(name, {name: {0: 1.0}})]}, "kinds": {name: (name, "red")}}
    plots.plot_lanes(tmp_path / "lanes.png", name, **lanes, bin_seconds=1.0, end=2.0, changes=(name, [1.0]))
    for file in ("loss.png", "lanes.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert not list(recwarn)


def test_a_users_own_settings_of_matplotlib_take_nothing_away(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True}):
        plots.plot_losses(tmp_path / "loss.png", [(1, 2.0), (2_000_000, 1e7)], [], {}, "a$_b")
    assert (tmp_path / "loss.png").exists()
