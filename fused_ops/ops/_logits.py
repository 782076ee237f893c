"""What the losses over rows of logits share. Names as in `fused_ops.ops.cross_entropy`."""


def as_rows(x):
    """(C,), (N, C) or (N, C, d1, d2, ...) as rows of classes, (rows, C)."""
    if x.dim() == 2:
        return x
    return x[None] if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)


def without_classes(x):
    """The shape of (C,), (N, C) or (N, C, d1, d2, ...) without its C."""
    return x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()


def neg_log_softmax(x):
    """The two parts of lse, m (N, 1) and log_z (N, 1), and −log p = log_z − (x − m), (N, C)."""
    m = x.amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)  # (N, 1)
    log_z = (x - m).exp().sum(1, keepdim=True).log()  # (N, 1)
    return m, log_z, log_z - (x - m)


def reduced(losses, reduction, divisor):
    """The rows' losses, (N,), or their sum or their mean, ()."""
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def row_gradient(dloss, reduction, divisor, x):
    """g_n, the gradient of the whole by one row's loss: (N, 1)."""
    g = dloss / divisor if reduction == "mean" else dloss
    return g.to(x.dtype).expand(len(x))[:, None]
