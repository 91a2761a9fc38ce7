"""Two fits on real data, each beside a baseline.

The density of a table, and the posterior of a model.

1. Wine quality: 11 measurements and a grade of 6,497 wines. A neural spline flow and
   ``DensityEstimator`` against a multivariate normal on held-out wines.
2. Eight schools: a flow guide against Pyro's multivariate normal guide and long-run MCMC.

Prints both tables and saves their pictures. Under three minutes on two cores:

    python examples/demo.py
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyroflows import AutoFlow, DensityEstimator, diagnose, fit, fit_guide, neural_spline

HERE = Path(__file__).parent
# To what step each column was recorded
STEPS = {
    "fixed_acidity": 0.1,
    "volatile_acidity": 0.01,
    "citric_acid": 0.01,
    "residual_sugar": 0.1,
    "chlorides": 0.001,
    "free_sulfur_dioxide": 1.0,
    "total_sulfur_dioxide": 1.0,
    "density": 0.0001,
    "pH": 0.01,
    "sulphates": 0.01,
    "alcohol": 0.1,
    "quality": 1.0,
}
# Posterior mean and standard deviation by 10 chains of 1,000 draws (posteriordb,
# eight_schools_noncentered)
REFERENCE = {
    "mu": ([4.411], [3.309]),
    "tau": ([3.602], [3.198]),
    "theta": (
        [6.151, 4.940, 3.906, 4.796, 3.614, 4.051, 6.317, 4.884],
        [5.616, 4.646, 5.281, 4.771, 4.615, 4.796, 5.003, 5.318],
    ),
}


def table(args: argparse.Namespace) -> None:
    """Fit the density of the wines; compare on held-out rows, in nats, on standardized columns."""
    wine = pd.read_csv(HERE / "data" / "wine_quality.csv.gz")[list(STEPS)]
    wine = wine.sample(frac=1, random_state=args.seed)
    # a column recorded to a step has no density: spread each value over its step
    steps = np.array(list(STEPS.values()))
    spread = np.random.default_rng(args.seed).uniform(size=wine.shape)
    wine = (np.floor(wine / steps + 1e-6) + spread) * steps
    train, test = wine.iloc[:-1000], wine.iloc[-1000:]
    loc, scale = train.mean(), train.std()
    x, y = (
        torch.tensor(((part - loc) / scale).to_numpy(), dtype=torch.float32)
        for part in (train, test)
    )

    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    rows = [("multivariate normal", float(normal.log_prob(y).mean()))]

    flow = neural_spline(x.shape[1])
    history = fit(flow, x, num_epochs=args.epochs, device=args.device, seed=args.seed)
    with torch.no_grad():
        rows.append(("neural_spline + fit", float(flow.log_prob(y.to(args.device)).mean())))
    print(history)

    estimator = DensityEstimator(random_state=args.seed, max_time=args.seconds, device=args.device)
    estimator.fit(train)
    score = float(np.mean(estimator.score_samples(test))) + float(np.log(scale).sum())
    rows.append(("DensityEstimator", score))

    print(f"\nWine quality, {x.shape[1]} columns: mean log-density of {len(test)} held-out rows")
    for name, value in rows:
        print(f"  {name:22s}{value:9.3f}   {value - rows[0][1]:+.3f} over the normal")
    _draw_table(train, estimator.sample(len(train)), args.out / "demo_wine.png")


def schools(sigma: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """Eight schools, non-centered (Rubin 1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def posterior(args: argparse.Namespace) -> None:
    """Fit the posterior with a flow and with Pyro's normal guide; compare with the reference."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    pyro.set_rng_seed(args.seed)

    pyro.clear_param_store()
    normal = AutoMultivariateNormal(schools)
    svi = SVI(
        schools,
        normal,
        pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / args.steps)}),
        Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1),
    )
    for _ in range(args.steps):
        svi.step(sigma, y)

    pyro.clear_param_store()
    guide = AutoFlow(schools)
    fit_guide(schools, guide, sigma, y, seed=args.seed)

    draws = {
        "AutoMultivariateNormal": _draws(normal, sigma, y),
        "AutoFlow": _draws(guide, sigma, y),
    }
    print("\nEight schools: posterior mean and standard deviation, worst error in reference sd")
    print(f"  {'':24s}{'mu':>14s}{'tau':>14s}{'theta[1]':>14s}{'worst':>8s}")
    print(
        f"  {'MCMC reference':24s}"
        + "".join(f"{REFERENCE[k][0][0]:8.2f} ({REFERENCE[k][1][0]:.2f})" for k in REFERENCE)
    )
    for name, sites in draws.items():
        cells, worst = "", 0.0
        for site, (mean, sd) in REFERENCE.items():
            got, spread = sites[site].mean(0).view(-1), sites[site].std(0).view(-1)
            cells += f"{got[0]:8.2f} ({spread[0]:.2f})"
            error = (got - torch.tensor(mean)).abs() / torch.tensor(sd)
            worst = max(worst, float(error.max()))
        print(f"  {name:24s}{cells}{worst:8.2f}")
    print()
    print(diagnose(schools, guide, sigma, y))
    _draw_posterior(draws, args.out / "demo_schools.png")


def _draws(
    guide: AutoFlow | AutoMultivariateNormal, *data: torch.Tensor, n: int = 10_000
) -> dict[str, torch.Tensor]:
    with torch.no_grad(), pyro.plate("draws", n, dim=-2):
        sites = guide(*data)
    mu, tau, z = (sites[k].reshape(n, -1) for k in ("mu", "tau", "z"))
    return {"mu": mu, "tau": tau, "theta": mu + tau * z}


def _draw_table(real: pd.DataFrame, drawn: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 4, figsize=(11, 7), constrained_layout=True)
    for ax, name in zip(axes.flat, real.columns[:11], strict=False):
        edges = np.linspace(*real[name].quantile([0.005, 0.995]), 50)
        ax.hist(real[name], edges, density=True, color="0.75", label="wines")
        ax.hist(drawn[name], edges, density=True, histtype="step", color="C0", label="samples")
        ax.set_title(name, fontsize=9)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=4)
    axes.flat[0].legend(fontsize=8)
    ax = axes.flat[-1]
    ax.plot(real["density"], real["alcohol"], ".", ms=1, color="0.6")
    ax.plot(drawn["density"], drawn["alcohol"], ".", ms=1, color="C0", alpha=0.5)
    ax.set(xlabel="density", ylabel="alcohol")
    ax.set_xlim(*real["density"].quantile([0.001, 0.999]))
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def _draw_posterior(draws: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(9, 3.8), constrained_layout=True, sharex=True, sharey=True
    )
    for ax, (name, sites) in zip(axes, draws.items(), strict=True):
        log_tau = sites["tau"][:4000, 0].log()
        ax.plot(sites["theta"][:4000, 0], log_tau, ".", ms=1.5, alpha=0.5)
        ax.set(title=name, xlabel="theta[1]", xlim=(-25, 45), ylim=(-6, 4))
    axes[0].set_ylabel("log tau")
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path.cwd(), help="folder of the pictures")
    parser.add_argument("--epochs", type=int, default=40, help="sweeps of neural_spline's fit")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of DensityEstimator")
    parser.add_argument("--steps", type=int, default=2000, help="SVI steps of Pyro's guide")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke_test:
        args.epochs, args.seconds, args.steps = 1, 3.0, 20
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    table(args)
    posterior(args)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
