"""Trains on a grid, exports, saves and loads, with only the dependencies that a wheel installs."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clipquant
from optax_clipquant import Uniform, clip_by_value, export_params, load, quantize_weights, save

assert pathlib.Path(optax_clipquant.__file__).is_relative_to(sys.prefix), optax_clipquant.__file__
for name in set(optax_clipquant.__all__) - {"plots"}:  # needs the extra plot
    getattr(optax_clipquant, name)

tx = optax.chain(clip_by_value(1.0), optax.adam(1e-2), quantize_weights(Uniform(bits=4)))
params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)}
state = tx.init(params)


@jax.jit
def step(params, state):
    grads = jax.grad(lambda p: jnp.mean(jnp.square(jnp.tanh(p["kernel"]) - 0.5)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


for _ in range(5):
    params, state = step(params, state)
save("model.safetensors", export_params(params, state))
np.testing.assert_array_equal(np.asarray(load("model.safetensors")["kernel"]), params["kernel"])
