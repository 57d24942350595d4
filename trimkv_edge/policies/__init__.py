"""Eviction policies: one file each, one line here."""

from trimkv_edge.policies import (
    full,
    global_budget,
    h2o,
    keydiff,
    layer_budget,
    r_kv,
    random,
    snapkv,
    streaming,
    tova,
    trimkv,
)
from trimkv_edge.policies.base import Policy

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        trimkv.POLICY,
        global_budget.POLICY,
        layer_budget.POLICY,
        full.POLICY,
        streaming.POLICY,
        keydiff.POLICY,
        random.POLICY,
        h2o.POLICY,
        snapkv.POLICY,
        r_kv.POLICY,
        tova.POLICY,
    )
}
