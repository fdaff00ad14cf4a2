"""The quasi-recurrent neural network, arXiv 1611.01576: ForgetMult, QRNNLayer and QRNN."""

from qrnn.forget_mult import ForgetMult
from qrnn.layer import QRNN, QRNNLayer
