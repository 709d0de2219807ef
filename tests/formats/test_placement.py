"""``load(like=...)`` places each leaf where the leaf of ``like`` is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import weights

from optax_clipquant import Uniform, load, quantize_params, save

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 host devices")


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y"), (("x", "y"),), ()], ids=str)
def test_leaves_land_with_the_sharding_of_like(tmp_path, spec, abstract):
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices("cpu")[:8])
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    params = {"w": jnp.asarray(weights((32, 8))), "float": jnp.asarray(weights((8, 8))), "b": jnp.ones(8)}  # fmt: skip
    tree = quantize_params(params, {"w": Uniform(4, group_size=8)})
    save(tmp_path / "file", tree)
    shardings = {"w": sharding, "float": sharding, "b": jax.NamedSharding(mesh, jax.P())}
    if abstract:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)  # fmt: skip
    else:
        like = jax.device_put(params, shardings)
    loaded = load(tmp_path / "file", like=like)
    for name in ("float", "b"):
        assert loaded[name].sharding.is_equivalent_to(shardings[name], loaded[name].ndim)
        np.testing.assert_array_equal(loaded[name], params[name])
    q = loaded["w"]
    assert q.qvalue.sharding.is_equivalent_to(sharding, 2)
    assert q.scale.sharding.device_set == sharding.device_set
    wanted = spec[1:2] + (None,) * (1 - len(spec[1:2]))
    assert q.scale.sharding.spec[1:] == wanted
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(np.asarray(q.dequantize()), np.asarray(tree["w"].dequantize()))  # fmt: skip
    again = load(tmp_path / "file", like=loaded)
    assert again["w"].qvalue.sharding == q.qvalue.sharding
    assert again["w"].scale.sharding == q.scale.sharding


def test_leaves_land_on_a_device_that_is_not_the_default(tmp_path):
    device = jax.devices("cpu")[3]
    tree = {"q": Uniform(4).quantize(jnp.asarray(weights((8, 4)))), "w": jnp.ones(3)}
    save(tmp_path / "file", tree)
    loaded = load(tmp_path / "file", like=jax.device_put(tree, device))
    for leaf in jax.tree.leaves(loaded):
        assert leaf.devices() == {device}
    for leaf in jax.tree.leaves(load(tmp_path / "file", like=tree)):
        assert not leaf.committed
