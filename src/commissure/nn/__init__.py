"""tmp"""
from commissure.nn.gru import GRU
from commissure.nn.s4d import S4D
from commissure.nn.mamba import Mamba
def mixer(name, dim): return {"s4d":S4D,"mamba":Mamba,"gru":GRU}[name](dim)
