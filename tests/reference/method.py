"""The method in float64 numpy, for one signal, without an automatic derivative and without a line of the package.

    h_1 = sin(w_1 (x W_1 + b_1))
    s_k = sin(w_k (h_{k-1} W_k + b_k + phi M_k + c_k))        k = 2..K-1
    h_k = h_{k-1} + s_k  (residual)  or  s_k
    f   = h_{K-1} W_K + b_K + offset

    L(phi; C) = mean over the points of C and the channels of (f - y)^2
    phi_0 = 0,  phi_{g+1} = phi_g - alpha dL(phi_g; C_g)/dphi
    meta loss = mean over signals of L(phi_G; all points)

dL/dphi is written by hand. Gradients in the parameters are complex steps: for an analytic function F,
F(p + ih) = F(p) + ih F'(p) + O(h^2), and with h = 1e-40 the imaginary part over h is F' to rounding, through all inner
steps at once. A complex parameter gets one step an entry, along a leading axis, which everything below carries along.
"""

import numpy as np

STEP = 1e-40


def omega_schedule(case):
    """Frequencies w_k, [K]."""
    first, last, layers = case["omega_first"], case["omega_last"], case["layers"]
    return np.array([first + k * (last - first) / (layers - 1) for k in range(layers)])


def grid(shape):
    """Coordinates [N, C] of a regular grid in [-1, 1], both ends included."""
    points = [[-1 + 2 * i / (n - 1) for i, n in zip(index, shape, strict=True)] for index in np.ndindex(*shape)]
    return np.array(points)


def _sine_and_cosine(u):
    """sin u and cos u; of u = a + ib, with a the same for all steps and b so small that sin(ib) = ib, cos(ib) = 1."""
    if np.isrealobj(u):
        return np.sin(u), np.cos(u)
    a, b = u[:1].real, u.imag
    sine, cosine = np.sin(a), np.cos(a)
    return sine + 1j * (cosine * b), cosine - 1j * (sine * b)


def _row(vector):
    """[..., L] as a row of [..., n, L]."""
    return vector[..., None, :]


def _transposed(matrix):
    return np.swapaxes(matrix, -1, -2)


def forward(case, params, phi, x):
    """f [..., n, D] at x [n, C] for phi [..., P]; and w_k cos(w_k u_k) of each modulated layer k."""
    omega, last = omega_schedule(case), case["layers"]
    h, _ = _sine_and_cosine(omega[0] * (x @ params["layer_1/kernel"] + _row(params["layer_1/bias"])))
    derivatives = {}
    for k in range(2, last):
        shift = _row(phi) @ params[f"modulation_{k}/kernel"] + _row(params[f"modulation_{k}/bias"])
        u = h @ params[f"layer_{k}/kernel"] + _row(params[f"layer_{k}/bias"]) + shift
        s, cosine = _sine_and_cosine(omega[k - 1] * u)
        derivatives[k] = omega[k - 1] * cosine
        h = h + s if case["residual"] else s
    return h @ params[f"layer_{last}/kernel"] + _row(params[f"layer_{last}/bias"]) + case["offset"], derivatives


def loss_and_gradient(case, params, phi, x, y):
    """L [...] and dL/dphi [..., P] of one signal y [n, D] at x [n, C]."""
    values, derivatives = forward(case, params, phi, x)
    errors = values - y
    loss = (errors**2).mean((-1, -2))
    ct_hidden = 2 / y.size * errors @ _transposed(params[f"layer_{case['layers']}/kernel"])
    gradient = 0
    for k in reversed(derivatives):
        ct_pre = ct_hidden * derivatives[k]
        gradient = gradient + (_row(ct_pre.sum(-2)) @ _transposed(params[f"modulation_{k}/kernel"]))[..., 0, :]
        below = ct_pre @ _transposed(params[f"layer_{k}/kernel"])
        ct_hidden = ct_hidden + below if case["residual"] else below
    return loss, gradient


def descend(case, params, x, y, contexts):
    """phi_0..phi_G and the losses before each step; contexts are the points of each, [G, n]."""
    latents, losses = [np.zeros(case["latent_dim"])], []
    for rows in contexts:
        loss, gradient = loss_and_gradient(case, params, latents[-1], x[rows], y[rows])
        latents.append(latents[-1] - case["inner_lr"] * gradient)
        losses.append(loss)
    return latents, losses


def meta_loss(case, params, x, signals, contexts):
    """The mean outer loss [...] over signals [B, N, D], with contexts [B, G, n]."""
    total = 0
    for y, rows in zip(signals, contexts, strict=True):
        phi = descend(case, params, x, y, rows)[0][-1]
        total = total + loss_and_gradient(case, params, phi, x, y)[0]
    return total / len(signals)


def gradient(function, params):
    """Gradients of function(params), a number, in every array of `params`."""
    found = {}
    for name, value in params.items():
        directions = np.eye(value.size).reshape(value.size, *value.shape)
        stepped = params | {name: value + 1j * STEP * directions}
        found[name] = (function(stepped).imag / STEP).reshape(value.shape)
    return found
