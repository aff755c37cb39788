"""Post-training quantization: the weights of a model in fewer bits, and what that costs."""

from nemotron3.quantization.by_matrix import can_quantize_by_matrix, quantize_by_matrix
from nemotron3.quantization.calibration import calibrate
from nemotron3.quantization.comparison import Comparison, compare
from nemotron3.quantization.formats import Format, formats_for
from nemotron3.quantization.quantize import quantized_model
from nemotron3.quantization.weight_errors import MatrixReport, matrix_reports, total_bits

__all__ = [
    "Comparison",
    "Format",
    "MatrixReport",
    "calibrate",
    "can_quantize_by_matrix",
    "compare",
    "formats_for",
    "matrix_reports",
    "quantize_by_matrix",
    "quantized_model",
    "total_bits",
]
