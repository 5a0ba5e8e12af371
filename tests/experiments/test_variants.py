"""Every named variant is a config that passes its check, and differs from the quickstart in what it names alone."""

import pytest

from configs import quickstart
from experiments.variants import FACTORS, FULL_SIZE, VARIANTS, with_variant
from orchestra_jax.components import check_config
from orchestra_jax.config import RunConfig
from orchestra_jax.run_directory import config_as_dict
from orchestra_jax.settings import batch_shape, loss_settings, scoring_settings


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_config_that_differs_in_what_it_names(name):
    config = quickstart.get_config()
    changed = with_variant(config, name, seed=3)
    check_config(changed)
    for build in (batch_shape, loss_settings, scoring_settings):
        build(changed)
    before, after = (dict(leaves(config_as_dict(each))) for each in (config, changed))
    differing = {path for path, value in after.items() if value != before[path]}
    assert differing == {"seed", *VARIANTS[name]} - ({"grpo.range_rule"} if name == "anchored" else set())


def test_three_variants_are_for_full_size_and_an_unknown_one_is_named():
    assert set(FULL_SIZE) <= set(FACTORS) and len(FULL_SIZE) == 3
    with pytest.raises(ValueError, match="variant 'papr' is not one of"):
        with_variant(RunConfig(), "papr", seed=0)
