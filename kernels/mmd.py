def fwd(*args):
    return NotImplemented
