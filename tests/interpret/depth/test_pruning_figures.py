from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.interpret.depth.figures import pruned_layer_losses

MODELS, ORDERS, NUMBERS = ["one", "other"], ["by loss", "by angle", "last"], [1, 2, 4, 8]


def losses():
    return pd.DataFrame(
        [
            {
                "model": model,
                "order": order,
                "n_dropped": n,
                "loss_increase_nats": n * (place + 1),
                "standard_error": 0.1,
            }
            for model in MODELS
            for place, order in enumerate(ORDERS)
            for n in NUMBERS
        ]
    )


def drawn(axes):
    return {each.get_label(): np.asarray(each.lines[0].get_ydata(), dtype=np.float64) for each in axes.containers}


def test_a_panel_a_model_has_a_line_an_order():
    figure = pruned_layer_losses(losses().sample(frac=1, random_state=0).sort_values(["model", "order"]))
    assert [axes.get_title() for axes in figure.axes] == MODELS
    for axes in figure.axes:
        assert set(drawn(axes)) == set(ORDERS)
        np.testing.assert_allclose(drawn(axes)["last"], 3 * np.array(NUMBERS))
    containers: Any = figure.axes[0].containers
    colours = {container.lines[0].get_color() for container in containers}
    assert len(colours) == len(ORDERS)


def test_a_loss_that_is_not_finite_breaks_the_line():
    table = losses()
    table.loc[1, "loss_increase_nats"] = np.nan
    assert np.isnan(drawn(pruned_layer_losses(table).axes[0])["by loss"][1])


def test_frames_that_do_not_fit():
    with pytest.raises(InputError, match="the pruned losses frame lacks order"):
        pruned_layer_losses(losses().drop(columns="order"))
    with pytest.raises(InputError, match="more than one row for model one, order by loss, n_dropped 1"):
        pruned_layer_losses(pd.concat([losses(), losses()]))
    with pytest.raises(InputError, match="5 orders; at most 4 can be told apart"):
        pruned_layer_losses(pd.concat([losses().replace("last", f"order {n}") for n in range(3)]).drop_duplicates())
