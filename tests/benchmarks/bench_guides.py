"""Guides against reference draws, and the cost of a step against Pyro's.

Two parts. Posteriors: fits AutoFlow by fit_guide's defaults to the posteriors in
``../shared/posteriors`` (skipped where that folder is missing) and prints the errors in reference
standard deviations. Steps: processor time of an SVI step of a five-layer flow over 16 latents.

    python -m tests.benchmarks.bench_guides --seeds 3
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive, affine_coupling, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

from pyroflows import AutoFlow, diagnose, fit_guide, transforms

POSTERIORS = Path(__file__).parents[3] / "shared" / "posteriors"


def posteriors(seeds: int) -> None:
    """Errors of AutoFlow on posteriors with reference draws."""
    if not POSTERIORS.exists():
        print(f"skipped: {POSTERIORS} is missing")
        return
    sys.path.insert(0, str(POSTERIORS))
    from metrics import MODELS, evaluate_guide, load

    print(f"{'posterior':28s}seed  mean err  log sd ratio    W1     ELBO     ESS  cpu s  trusted")
    for name in MODELS:
        for seed in range(seeds):
            pyro.clear_param_store()
            spec, data, reference = load(name)
            guide = AutoFlow(spec.model)
            result = fit_guide(spec.model, guide, data, seed=seed, progress=False)
            e = evaluate_guide(guide, spec, data, reference)
            verdict = diagnose(spec.model, guide, data)
            print(
                f"{name:28s}{seed:4d}{e['mean_err']:10.3f}{e['sd_lograt']:14.3f}{e['w1_max']:6.3f}"
                f"{e['elbo']:9.3f}{e['ess']:8.3f}{result.cpu_seconds:7.1f}  {verdict.ok}",
                flush=True,
            )
    torch.set_default_dtype(torch.float32)


def model() -> None:
    """Sixteen latents and one observation."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([16]).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))


def median_ms(step, repeats: int = 100) -> float:
    """Median processor time of a step, in milliseconds."""
    times = []
    for i in range(repeats + 20):
        begun = time.process_time()
        step()
        if i >= 20:
            times.append(time.process_time() - begun)
    return 1e3 * statistics.median(times)


def steps() -> None:
    """Cost of a step with five layers, sixteen particles: Pyro's guide, ours in SVI, fit_guide."""
    elbo, width = Trace_ELBO(16, vectorize_particles=True), [16, 16]
    for name, theirs, ours in (
        ("autoregressive", affine_autoregressive, transforms.affine_autoregressive),
        ("coupling", affine_coupling, transforms.affine_coupling),
    ):
        guides = {
            "AutoNormalizingFlow": AutoNormalizingFlow(
                model, lambda d, t=theirs: iterated(5, t, d, hidden_dims=width)
            ),
            "AutoFlow": AutoFlow(
                model, flow=lambda d, t=ours: [t(d, hidden_dims=width) for _ in range(5)]
            ),
        }
        cost = {}
        for label, guide in guides.items():
            pyro.clear_param_store()
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
            cost[label] = median_ms(svi.step)
        spent = []
        for n in (50, 250):
            begun = time.process_time()
            fit_guide(
                model, guide, num_steps=n, num_particles=16, progress=False, prefit_first=False
            )
            spent.append(time.process_time() - begun)
        cost["fit_guide"] = 1e3 * (spent[1] - spent[0]) / 200
        base = cost["AutoNormalizingFlow"]
        print(name, {k: f"{v:.2f} ms, {base / v:.2f}x" for k, v in cost.items()}, flush=True)


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps()
    posteriors(args.seeds)


if __name__ == "__main__":
    main()
