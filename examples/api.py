"""ViCO from Python: consistency steps on toy tensors; with a model, an answer of a routed image.

Run: python examples/api.py
     python examples/api.py /models/8b-flash page.png "What is the total?"
"""

import sys

import torch

import megatron_vico


def consistency_steps(num_steps: int = 200) -> list[float]:
    """Eq. 1 in miniature: a tile's 4 tokens or 1 of a connector; a head of 50 words reads them."""
    random = torch.Generator().manual_seed(0)
    tiles_N4D = torch.randn(13, 4, 16, generator=random)  # of two images, with 6 and 7 tiles
    head = torch.nn.Linear(16, 50).requires_grad_(False)
    connector_16x = torch.nn.Linear(4 * 16, 16)
    optimizer = torch.optim.Adam(connector_16x.parameters(), lr=1e-2)
    reference_NV = head(tiles_N4D.tanh().mean(dim=1))  # sees every tile whole
    losses = []
    for _ in range(num_steps):
        plan_N = megatron_vico.plan_fraction([6, 7], generator=random)  # xi ~ U[0, 1] an image
        tokens_ND = torch.where(
            plan_N[:, None], connector_16x(tiles_N4D.flatten(1)), tiles_N4D.tanh().mean(dim=1)
        )
        kl_N = megatron_vico.forward_kl(reference_NV, head(tokens_ND))  # 0 where a tile is kept
        optimizer.zero_grad()
        kl_N.mean().backward()
        optimizer.step()
        losses.append(kl_N.sum().item() / max(1, int(plan_N.sum())))
    return losses


if __name__ == "__main__":
    losses = consistency_steps()
    print(
        f"KL of a compressed tile: {losses[0]:.3f} nats, after {len(losses)} steps {losses[-1]:.3f}"
    )
    if len(sys.argv) > 1:
        folder, image, question = sys.argv[1:]
        with megatron_vico.load_model(folder) as model:
            answers = model.ask(question, [image])
            tiles, compressed = len(answers.compressed_N), int(answers.compressed_N.sum())
            print(f"{compressed} of {tiles} tiles compressed: {answers.texts[0]}")
