"""What the kernels save of each step, and the way back from it, written out in torch operations.

The product derives its second derivatives from the formulas in fastrnn/reference.py alone. The backward
kernels start from saved numbers, rounded as they are stored, and are held against this file; test_scan.py
holds this file against torch's derivative of the reference.
"""

from dataclasses import replace

import torch

from fastrnn import _operators, reference
from fastrnn.reference import CELLS

# (x [G], a [G]), and with vectors of parameters (c_{t-1}, *u) -> the saved activations [S] of one step.


def lstm_saved(x, a):
    i, f, g, o = (x[k] + a[k] for k in range(4))
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_peephole_saved(x, a, c, w_ci, w_cf, w_co):
    i, f = torch.sigmoid(x[0] + a[0] + w_ci * c), torch.sigmoid(x[1] + a[1] + w_cf * c)
    g = torch.tanh(x[2] + a[2])
    return i, f, g, torch.sigmoid(x[3] + a[3] + w_co * (f * c + i * g))


NORM_EPS = 1e-5


def moments(v):
    mean = v.mean(-1, keepdim=True)
    return mean, 1 / torch.sqrt((v - mean).square().mean(-1, keepdim=True) + NORM_EPS)


def lstm_layer_norm_saved(x, a, c, *u):
    """The activated gates, n(W_hh h) of each, and mean and 1 / deviation of W_hh h and of c."""
    mean, scale = moments(torch.cat(a, -1))
    normed = [(part - mean) * scale for part in a]
    i, f, g, o = (x[k] + u[k] * normed[k] + u[4 + k] for k in range(4))
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    return i, f, g, o, *normed, mean, scale, *moments(f * c + i * g)


def lstm_coupled_saved(x, a):
    f, g, o = (x[k] + a[k] for k in range(3))
    return torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def gru_saved(x, a):
    r, z = torch.sigmoid(x[0] + a[0]), torch.sigmoid(x[1] + a[1])
    return r, z, torch.tanh(x[2] + r * a[2]), a[2]


def gru_layer_norm_saved(x, a, *u):
    """n(W_hh h) of each gate, the activated gates, and 1 / deviation and mean of W_hh h."""
    mean, scale = moments(torch.cat(a, -1))
    normed = [(part - mean) * scale for part in a]
    q = [u[k] * normed[k] + u[3 + k] for k in range(3)]
    r, z = torch.sigmoid(x[0] + q[0]), torch.sigmoid(x[1] + q[1])
    return *normed, r, z, torch.tanh(x[2] + r * q[2]), scale, mean


def layer_norm_gru_saved(x, a, *u, centred=True):
    """n of the sum for each gate, sigmoid(r), 1 - u, the candidate, and 1 / deviation and mean."""
    v = torch.cat([x[k] + a[k] for k in range(3)], -1)
    mean = v.mean(-1, keepdim=True) if centred else 0.0
    scale = 1 / torch.sqrt((v - mean).square().mean(-1, keepdim=True) + u[6].mean())
    normed = ((v - mean) * scale).chunk(3, -1)
    r, c, u_ = (u[k] * normed[k] + u[3 + k] for k in range(3))
    r = torch.sigmoid(r)
    return *normed, r, 1 - torch.sigmoid(u_ - 1), torch.tanh(r * c), scale, *([mean] if centred else [])


def rms_norm_gru_saved(x, a, *u):
    return layer_norm_gru_saved(x, a, *u, centred=False)


def slstm_saved(x, a, cnm):
    i, f, g, o = (x[k] + a[k] for k in range(4))
    m = cnm.chunk(3, -1)[2]
    lead = torch.nn.functional.logsigmoid(f) + m - i
    return lead, torch.sigmoid(-f), torch.tanh(g), torch.sigmoid(o)


def nothing_saved(x, a, *state_and_u):
    return ()


# (saved, h, h_prev, c, c_prev, dh, dc, *u) -> (dgates [E], dh_prev, dc, dc_prev, *du): the last G of dgates
# are x's, dh_prev is what does not pass through a, and dc is now complete. Of cells with further states c is
# all those beside h, side by side.


def lstm_back(saved, h, h_prev, c, c_prev, dh, dc):
    i, f, g, o = saved
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c**2)
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    dgates = (di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o))
    return dgates, None, dc, dc * f


def lstm_peephole_back(saved, h, h_prev, c, c_prev, dh, dc, w_ci, w_cf, w_co):
    i, f, g, o = saved
    tanh_c = torch.tanh(c)
    do = dh * tanh_c * o * (1 - o)
    dc = dc + dh * o * (1 - tanh_c**2) + do * w_co
    di, df = dc * g * i * (1 - i), dc * c_prev * f * (1 - f)
    dc_prev = dc * f + di * w_ci + df * w_cf
    return (di, df, dc * i * (1 - g**2), do), None, dc, dc_prev, di * c_prev, df * c_prev, do * c


def normed_back(dn, n, scale, centred=True):
    """The derivative of n(v) = (v - mean) * scale by v."""
    centre = dn.mean(-1, keepdim=True) if centred else 0.0
    return scale * (dn - centre - n * (dn * n).mean(-1, keepdim=True))


def lstm_layer_norm_back(saved, h, h_prev, c, c_prev, dh, dc, *u):
    i, f, g, o, *normed, numbers = saved
    normed, (_, scale, mean_c, scale_c) = torch.cat(normed, -1), numbers.split(1, -1)
    n = (c - mean_c) * scale_c
    t = torch.tanh(u[8] * n + u[9])
    dt = dh * o * (1 - t**2)
    dc = dc + normed_back(dt * u[8], n, scale_c)
    da = (dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g**2), dh * t * o * (1 - o))
    together = torch.cat(da, -1)
    recurrent = normed_back(together * torch.cat(u[:4]), normed, scale)
    dgain = (together * normed).split(c.shape[-1], -1)
    return (*recurrent.split(c.shape[-1], -1), *da), None, dc, dc * f, *dgain, *da, dt * n, dt


def indrnn_tanh_back(saved, h, h_prev, c, c_prev, dh, dc, u):
    d = dh * (1 - h**2)
    return (d,), d * u, None, None, d * h_prev


def indrnn_relu_back(saved, h, h_prev, c, c_prev, dh, dc, u):
    d = torch.where(h <= 0, torch.zeros_like(dh), dh)
    return (d,), d * u, None, None, d * h_prev


def lstm_coupled_back(saved, h, h_prev, c, c_prev, dh, dc):
    f, g, o = saved
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c**2)
    df, dg, do = dc * (c_prev - g), dc * (1 - f), dh * tanh_c
    return (df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)), None, dc, dc * f


def gru_back(saved, h, h_prev, c, c_prev, dh, dc):
    r, z, n, q = saved
    dn, dz = dh * (1 - z) * (1 - n**2), dh * (h_prev - n)
    dr, dq = dn * q, dn * r
    return (dq, dr * r * (1 - r), dz * z * (1 - z), dn), dh * z, None, None


def gru_layer_norm_back(saved, h, h_prev, c, c_prev, dh, dc, *u):
    *normed, r, z, n, numbers = saved
    normed, q = torch.cat(normed, -1), u[2] * normed[2] + u[5]
    dn, dz = dh * (1 - z) * (1 - n**2), dh * (h_prev - n) * z * (1 - z)
    dr = dn * q * r * (1 - r)
    dq = dr, dz, dn * r
    recurrent = normed_back(torch.cat(dq, -1) * torch.cat(u[:3]), normed, numbers[:, :1]).chunk(3, -1)
    dgain = (torch.cat(dq, -1) * normed).chunk(3, -1)
    return (*recurrent, dr, dz, dn), dh * z, None, None, *dgain, *dq


def layer_norm_gru_back(saved, h, h_prev, c, c_prev, dh, dc, *u, centred=True):
    *normed, r, z, n, numbers = saved
    normed, q, scale = torch.cat(normed, -1), u[1] * normed[1] + u[4], numbers[:, :1]
    dn, du = dh * (1 - z) * (1 - n**2), dh * (n - h_prev) * z * (1 - z)
    dq = torch.cat((dn * q * r * (1 - r), dn * r, du), -1)
    dnormed = dq * torch.cat(u[:3])
    dv = normed_back(dnormed, normed, scale, centred).chunk(3, -1)
    deps = -(scale**2) / 2 * (dnormed * normed).sum(-1, keepdim=True) / h.shape[-1]
    return (*dv, *dv), dh * z, None, None, *(dq * normed).chunk(3, -1), *dq.chunk(3, -1), deps.expand_as(h)


def rms_norm_gru_back(*arguments):
    return layer_norm_gru_back(*arguments, centred=False)


def rnn_tanh_back(saved, h, h_prev, c, c_prev, dh, dc):
    return (dh * (1 - h**2),), None, None, None


def rnn_relu_back(saved, h, h_prev, c, c_prev, dh, dc):
    return (torch.where(h <= 0, torch.zeros_like(dh), dh),), None, None, None


def slstm_back(saved, h, h_prev, cnm, cnm_prev, dh, dcnm):
    lead, keep, g, o = saved
    (c, n, _), (c_prev, n_prev, _), (dc, dn, dm) = (t.chunk(3, -1) for t in (cnm, cnm_prev, dcnm))
    empty = n_prev == 0
    past = torch.exp(lead.clamp(max=0))
    i = torch.where(empty, 1.0, torch.exp((-lead).clamp(max=0)))
    dc, dn = dc + dh * o / n, dn - dh * o * c / n**2
    leads = (torch.sign(lead) + 1) / 2
    share = torch.where(empty, 0.0, leads)  # of the past in m
    d_lead = (1 - leads) * past * (dc * c_prev + dn * n_prev) - share * i * (dc * g + dn)
    d_past = d_lead + share * dm
    dgates = (
        (1 - share) * dm - d_lead,
        d_past * keep,
        dc * i * (1 - g**2),
        dh * c / n * o * (1 - o),
    )
    dcnm_prev = torch.cat((dc * past, dn * past, d_past), -1)
    return dgates, None, torch.cat((dc, dn, dm), -1), dcnm_prev


SAVED = {
    "lstm": lstm_saved,
    "lstm_peephole": lstm_peephole_saved,
    "lstm_layer_norm": lstm_layer_norm_saved,
    "lstm_coupled": lstm_coupled_saved,
    "gru": gru_saved,
    "rnn_tanh": nothing_saved,
    "rnn_relu": nothing_saved,
    "indrnn_tanh": nothing_saved,
    "indrnn_relu": nothing_saved,
    "slstm": slstm_saved,
    "gru_layer_norm": gru_layer_norm_saved,
    "layer_norm_gru": layer_norm_gru_saved,
    "rms_norm_gru": rms_norm_gru_saved,
}
BACK = {
    "lstm": lstm_back,
    "lstm_peephole": lstm_peephole_back,
    "lstm_layer_norm": lstm_layer_norm_back,
    "lstm_coupled": lstm_coupled_back,
    "gru": gru_back,
    "rnn_tanh": rnn_tanh_back,
    "rnn_relu": rnn_relu_back,
    "indrnn_tanh": indrnn_tanh_back,
    "indrnn_relu": indrnn_relu_back,
    "slstm": slstm_back,
    "gru_layer_norm": gru_layer_norm_back,
    "layer_norm_gru": layer_norm_gru_back,
    "rms_norm_gru": rms_norm_gru_back,
}


def forward(name, layout, x, states, weights):
    """The operator ``fastrnn::scan`` with everything kept: y, h_n, c_n, saved, every c ([0]: missing). The
    states beside h stand side by side in c_n and every c."""
    cell, saves, none = CELLS[name], [], x.new_empty(0)

    def step(x, a, states, *u):
        others = [torch.cat(states[1:], -1)] if len(states) > 2 or (u and states[1:]) else []
        save = SAVED[name](x, a, *others, *u)
        saves.append(torch.cat(save, -1) if save else none)
        return cell.step(x, a, states, *u)

    y, (h_n, *others), history = reference.forward(replace(cell, step=step), layout, x, states, weights)
    by_direction = saves[: layout.T], saves[layout.T :][::-1]
    saved = (
        [torch.stack([layout.assemble(by_direction[d]) for d in range(len(h_n))])] if cell.saved else [none]
    )
    c_n, every_c = (torch.cat(part, -1) if part else none for part in (others, history))
    return y, h_n, c_n, *saved, every_c


def numbers_of(cell, saved, H):
    """The saved numbers of the units, each [n, H], and those of the rows [n, R], if any."""
    units, numbers = saved.split([cell.saved * H, cell.row_numbers], -1)
    return (*units.split(H, -1), numbers) if cell.row_numbers else units.split(H, -1)


def backward(name, layout, dy, dh_n, dc_n, dall_c, saved, all_c, y, h0, c0, w_hh, w_hr, u, keep):
    """The operator ``fastrnn::scan_backward``: dgates, dh0, dc0, dL/dh_t, dL/dc_t, du ([0]: missing)."""
    cell = CELLS[name]
    D, _, P = h0.shape
    H = c0.shape[2] // (cell.states - 1) if cell.states > 1 else P
    steps, batch = layout.steps(), layout.order
    back = torch.argsort(batch)
    all_dgates, dh0, dc0, all_dh, all_dc = [], [], [], [], []
    du = [torch.zeros_like(vectors) for vectors in u]
    for d in range(D):
        y_d = y[:, d * P : (d + 1) * P]
        dh = dh_n[d][batch] if dh_n is not None else torch.zeros_like(h0[d])
        dc = None
        if cell.states > 1:
            dc = dc_n[d][batch] if dc_n is not None else torch.zeros_like(c0[d])
        dgates, dhs, dcs = ([None] * layout.T for _ in range(3))
        order = list(range(layout.T)) if d == 0 else list(reversed(range(layout.T)))
        for s in reversed(range(layout.T)):
            t = order[s]
            rows = steps[t]
            n = len(rows)

            def previous(values, initial, s=s, rows=rows, order=order):
                state = initial[batch][: len(rows)]
                if s > 0:
                    before = values[steps[order[s - 1]][: len(rows)]]
                    state = torch.cat((before, state[len(before) :]))
                return layout.keep(rows, state)

            dh_t = dh[:n] + dy[rows][:, d * P : (d + 1) * P] if dy is not None else dh[:n]
            dhs[t] = dh_t
            c = c_prev = dc_t = None
            if cell.states > 1:
                c, c_prev = all_c[d][rows], previous(all_c[d], c0[d])
                dc_t = dc[:n] + dall_c[d][rows] if dall_c is not None else dc[:n]
            gates, direct, dcs[t], dc_prev, *shares = BACK[name](
                numbers_of(cell, saved[d][rows], H) if cell.saved else (),
                y_d[rows],
                previous(y_d, h0[d]),
                c,
                c_prev,
                dh_t @ w_hr[d] if w_hr else dh_t,
                dc_t,
                *(u[d] if u else ()),
            )
            for k, share in enumerate(shares):
                du[d][k] += share.sum(0)
            dgates[t] = torch.cat(gates, -1)
            dh_prev = direct
            if cell.dense:
                dh_prev = _operators.recurrent_gradients(cell, dgates[t]) @ w_hh[d]
                dh_prev = dh_prev if direct is None else dh_prev + direct
            dh = torch.cat((layout.keep(rows, dh_prev), dh[n:]))
            dc = torch.cat((layout.keep(rows, dc_prev), dc[n:])) if cell.states > 1 else None
        all_dgates.append(layout.assemble(dgates))
        all_dh.append(layout.assemble(dhs))
        dh0.append(dh[back])
        if cell.states > 1:
            all_dc.append(layout.assemble(dcs))
            dc0.append(dc[back])
    none = h0.new_empty(0)
    return (
        torch.stack(all_dgates),
        torch.stack(dh0),
        torch.stack(dc0) if cell.states > 1 else none,
        torch.stack(all_dh) if w_hr or keep else none,
        torch.stack(all_dc) if cell.states > 1 and keep else none,
        torch.stack(du) if du else none,
    )
