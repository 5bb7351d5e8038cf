"""All that is worth measuring on an accelerator, by one command that stops in time and goes on where it stopped.

    python -m benchmarks.accelerator --minutes=8 --out=DIR [--data=CIFAR10.npz]

runs the parts of :data:`benchmarks.accelerator.parts.PARTS`, the most useful first, on the GPU or TPU that is there:

1. the peak of matrix products in bfloat16, and memory bandwidth;
2. every kernel of ours for this device against float64, beside the plain version: results and gradients;
3. the train steps of CRATE-MAE-B, ROPIM ViT-B, ViT-MAE-B and BYOL ResNet50, each beside its PyTorch model;
4. where the time of these steps goes, by kind of kernel;
5. the first three of these steps without our kernels;
6. the time of the kernels beside XLA's plain version and cuDNN's fused attention; more shapes of 2.;
7. steps that the input pipeline feeds from a folder of JPEGs;
8. the kernels with other tiles, so that the best ones can be chosen;
9. BYOL on CIFAR-10 with and without SO, for the rest of the minutes.

--only=questions --data=CIFAR10, with hours for --minutes, trains the sweeps that docs/claims.md has for the papers'
open questions, each with three seeds.

Each part writes DIR/PART.json after each of its cases, and DIR/PART.log; the table is in DIR/table.md and is printed.
The same command again leaves out what is there and goes on. A case runs in a process of its own or of its part; if it
fails, hangs or crashes, its row says so, and the other cases run in another process. It needs no network.

With --debug everything is tiny and runs on a CPU, to see that it runs before an accelerator is there.
"""
