import pytest

from optax_clipquant import Calibration, Use, Uses


def test_reduced_axes():
    assert Use({"dot"}, contracted={1, 0}).reduced(3) == (0, 1)
    assert Use({"dot", "lookup"}, contracted={1}, lookup={0}).reduced(2) == (1,)
    assert Use({"lookup"}, lookup={1}, stacked={0}).reduced(3) == (2,)
    with pytest.raises(ValueError, match=r"traced with the axes \[2\], but has only 2"):
        Use({"dot"}, contracted={2}).reduced(2)


def test_only_known_dots_convs_and_lookups_are_weights():
    assert Use({"dot", "elementwise"}, contracted={0}).is_weight
    assert Use("lookup", lookup={0}).is_weight
    assert not Use({"dot", "unknown"}, contracted={0}).is_weight
    assert not Use({"elementwise"}).is_weight
    assert not Use({"dot"}, contracted={0}, adapter=True).is_weight
    assert not Use().is_weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": {"matmul"}}, "kinds must be among dot, .*, got .'matmul'"),
        ({"contracted": {-1}}, r"contracted must be axes counted from 0, got \[-1\]"),
        ({"lookup": {0.5}}, "lookup must be axes counted from 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Use(**arguments)


def test_table_lists_all_uses_and_escapes_markup():
    uses = Uses(
        {
            "[bold]/w": Use({"dot", "lookup"}, {1}, stacked={0}, lookup={1}, others=[{0, 2}]),
            "lora": Use({"dot"}, contracted={0}, adapter=True),
            "old": Use(),
        },
        {"[bold]/w": (3, 4, 5)},
    )
    lines = str(uses).split("\n")[1:]
    rows = [" ".join(line.split()) for line in lines[2:-1]]
    assert rows == ["[bold]/w 3x4x5 dot, lookup 1 | 0, 2 0 1", "lora dot (adapter) 0", "old unused"]


def test_moments_of_untraced_leaves_are_refused():
    with pytest.raises(ValueError, match=r"no use: \['b'\]"):
        Calibration(Uses({"a": Use()}), {"b": 1.0})
