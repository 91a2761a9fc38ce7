"""A funnel, where NUTS struggles, and two ways in which a fitted flow mends it.

Neal's funnel: v ~ N(0, 3), x_i ~ N(0, exp(v/2)). NUTS alone hardly enters the neck (v < -4);
NUTS in the flow's coordinates (NeuTra; Hoffman et al. 2019) does, and so do chains that mix
proposals from the flow with Hamiltonian moves.

    python examples/neutra_funnel.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size

from pyroflows import AutoFlow, diagnose, fit_guide
from pyroflows.guides import flow_mcmc


def model() -> None:
    """Neal's funnel in ten dimensions."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()[..., None]).to_event(1))


def report(name: str, v: torch.Tensor) -> None:
    """Print the moments of v, which are known, for draws of shape (chains, draws)."""
    ess = effective_sample_size(v, chain_dim=0, sample_dim=1)
    neck = (v < -4).float().mean()
    print(f"{name:22s}{v.mean():8.2f}{v.std():8.2f}{neck:10.3f}{ess:10.0f}", flush=True)


def main() -> None:
    """Fit a flow guide; sample in three ways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, help="fewer steps than it takes to level off")
    parser.add_argument("--num-samples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_steps, args.num_samples = 20, 20

    guide = AutoFlow(model)
    fit_guide(model, guide, num_steps=args.num_steps, seed=args.seed, progress=False)
    print(diagnose(model, guide))
    print(f"\n{'':22s}{'mean v':>8s}{'sd v':>8s}{'P(v<-4)':>10s}{'ESS of v':>10s}")
    print(f"{'exact':22s}{0:8.2f}{3:8.2f}{0.091:10.3f}")

    pyro.set_rng_seed(args.seed)
    warmup = args.num_samples // 2
    plain = MCMC(NUTS(model), args.num_samples, warmup, disable_progbar=True)
    plain.run()
    report("NUTS", plain.get_samples()["v"][None])

    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(neutra.reparam(model), max_tree_depth=5)
    flowed = MCMC(kernel, args.num_samples, warmup, disable_progbar=True)
    flowed.run()
    draws = neutra.transform_sample(flowed.get_samples()["v_shared_latent"])
    report("NUTS with NeuTra", draws["v"][None])

    chains = flow_mcmc(model, guide, num_samples=max(10, args.num_samples // 4))
    report("flow_mcmc, 16 chains", chains.samples["v"])
    print(f"accepted {chains.independence_rate:.0%} of the draws; R-hat {chains.rhat:.3f}")


if __name__ == "__main__":
    main()
