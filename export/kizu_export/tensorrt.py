"""What TensorRT's ONNX parser documents: operators and the types each takes.

Source: onnx-tensorrt, docs/operators.md at 96e781103cfc (2024-06-17, TensorRT 10.0, opsets 9 to 20). BF16 and the
quantised types other than INT8 are left out: scorers use none. INT8 is what QuantizeLinear gives and DequantizeLinear
alone takes, zero points being 0. UINT8 stands for network inputs and outputs only.
"""

SOURCE = "onnx-tensorrt docs/operators.md, TensorRT 10.0"
OPSETS = range(9, 21)

_BY_TYPES = {
    "FP32 FP16 INT32 INT64": """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean
        Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub
        Sum TopK
    """,
    "FP32 FP16": """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos
        Cosh CumSum DeformConv Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
        GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf
        LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool
        MeanVarianceNormalization Mish NonMaxSuppression NonZero ParametricSoftplus Pow PRelu QuantizeLinear
        RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RNN RoiAlign Round
        ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample
    """,
    "INT8": """
        DequantizeLinear
    """,
    "BOOL": """
        And Not Or Xor
    """,
    "FP32 FP16 INT32 INT64 UINT8 BOOL": """
        Cast CastLike
    """,
    "FP32 FP16 INT32 INT64 BOOL": """
        Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop
        OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
}

OPERATOR_TYPES: dict[str, frozenset[str]] = {
    name: frozenset(types.split()) for types, names in _BY_TYPES.items() for name in names.split()
}
"""Operator → names of the types it takes."""
