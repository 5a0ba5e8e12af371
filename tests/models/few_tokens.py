"""Four rows of seven tokens before a head of eleven columns, for the tests of their scores and losses.

Legend: B rows, T tokens, D hidden, V vocab.
"""

import jax
import jax.numpy as jnp

KEYS = jax.random.split(jax.random.key(1), 5)
HIDDEN_BTD = jax.random.normal(KEYS[0], (4, 7, 5))
HEAD_DV = jax.random.normal(KEYS[1], (5, 11))
TARGETS_BT = jax.random.randint(KEYS[2], (4, 7), 0, 11)
WEIGHTS_2BT = jax.random.normal(KEYS[3], (2, 4, 7))
MASK_BT = jax.random.uniform(KEYS[4], (4, 7)) < 0.4
TEMPERATURE_B = jnp.array([0.5, 1.0, 2.0, 0.7])
