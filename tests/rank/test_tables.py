from __future__ import annotations

import torch

from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank import tables
from optuna_lora_rl.rank.truncation import Truncation

ORDER = [
    f"model.layers.{i}.{module}"
    for i in (0, 1, 10)
    for module in ("self_attn.q_proj", "mlp.up_proj")
]
SPECTRA = {
    name: spectrum.of_values(torch.tensor([4.0, 2.0 + i / 10]), (3, 2))
    for i, name in enumerate(ORDER)
}


def test_a_heat_map_begins_with_a_measure_that_tells_layers_apart() -> None:
    drawn = tables.heat_map(SPECTRA, "title")
    # All have two values over 1% of the largest.
    assert [trace.visible for trace in drawn.data].index(True) == 1
    assert drawn.layout.updatemenus[0].active == 1
    alike = tables.heat_map(dict.fromkeys(ORDER, SPECTRA[ORDER[0]]), "title")
    assert alike.data[0].visible


def test_a_heat_map_has_blocks_in_order_and_gaps_where_no_layer_is() -> None:
    some = {name: one for name, one in SPECTRA.items() if name != ORDER[-1]}
    trace = tables.heat_map(some, "title").data[-1]
    assert list(trace.y) == ["0", "1", "10"] and list(trace.x) == ["q_proj", "up_proj"]
    assert trace.z[2][0] == SPECTRA[ORDER[4]].frobenius_norm and trace.z[2][1] is None


def test_blocks_of_equal_ranks_share_a_row() -> None:
    ranks = {name: 4 if ".10." in name else 8 for name in ORDER}
    assert list(tables.ranks(ranks).columns[0].cells) == ["0-1", "10"]


def test_sizes_have_units() -> None:
    said = [tables.size(count) for count in (0, 999, 1500, 2.5e6, 537.9e6, 13.48e9)]
    assert said == ["0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "537.9 MB", "13.5 GB"]


def test_many_layers_share_rows_with_their_spread() -> None:
    names = [f"model.layers.{i}.{side}_proj" for i in range(30) for side in "qv"]
    many = {
        name: spectrum.of_values(torch.tensor([4.0] * (1 + place % 3)), (4, 5))
        for place, name in enumerate(names)
    }
    table = tables.spectra_in_groups(many, {"r": dict.fromkeys(names, 8)}, 200)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["layers"] == ["q_proj"] * 3 + ["v_proj"] * 3
    assert cells["blocks"] == ["0-9", "10-19", "20-29"] * 2
    assert cells["shape"] == ["4x5"] * 6 and cells["r"] == ["8"] * 6
    # Ranks 1, 3, 2, 1, 3, 2, ... over the first ten layers of q_proj.
    assert cells["over\n1%"][0] == "2 (1…3)"
    cut = Truncation(
        before=dict.fromkeys(names, 8),
        after={name: 4 + place % 2 for place, name in enumerate(names)},
        errors=dict.fromkeys(names, 0.125),
        parameters_before=2,
        parameters_after=1,
    )
    rows = list(
        zip(*(column.cells for column in tables.truncation_in_groups(cut).columns), strict=True)
    )
    assert rows[0] == ("q_proj", "0-9", "8", "4", "12.5") and len(rows) == 6
    narrow = tables.spectra_in_groups(many, {}, 60)
    assert len(narrow.columns) < len(table.columns)
