"""Device functions: what TIR has no word for, in CUDA C++ with inline PTX (PTX ISA 8.x, "Warp Level Matrix Multiply").

Every function does the same on all architectures; where an instruction is missing before sm_80, others do its work, but
for tf32, and for e4m3 before sm_89, which are missing there altogether. (Hopper does e4m3 of these instructions as float16;
only its warp-group instructions are faster.) The tests execute kernels without a GPU by a second implementation of these
functions, by name.
"""

from __future__ import annotations

from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import Expr
from tvm.tirx.script import builder as T

__all__ = ["FUNCTIONS", "call", "perform"]

_HEAD = "__forceinline__ __device__ "
# Name -> (dtype of the result or 'void', source).
FUNCTIONS: dict[str, tuple[str, str]] = {
    "qs_mul": ("float32", "float qs_mul(float a, float b) { return __fmul_rn(a, b); }"),
    "qs_add": ("float32", "float qs_add(float a, float b) { return __fadd_rn(a, b); }"),
    "qs_fma": ("float32", "float qs_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }"),
    "qs_round": ("int32", "int qs_round(float a) { return __float2int_rn(a); }"),
    # total + the sum of four products of bytes, without sign in a, with one in b.
    "qs_dot_bytes": (
        "int32",
        """int qs_dot_bytes(int total, int a, int b) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(total) : "r"(a), "r"(b));
  return total;
}""",
    ),
    # Four of the eight bytes of a and b: nibble i of `chosen` says which becomes byte i.
    "qs_permute": ("int32", "int qs_permute(int a, int b, int chosen) { return (int)__byte_perm(a, b, chosen); }"),
    # Four bytes of global memory.
    "qs_word": ("int32", "int qs_word(const void *from) { return *(const int *)from; }"),
    # Copy `bytes` (4, 8 or 16) from global to shared memory without waiting; the same constant in all calls of a kernel.
    "qs_copy_4": (
        "void",
        """void qs_copy_4(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
  *(int *)to = *(const int *)from;
#endif
}""",
    ),
    "qs_copy_8": (
        "void",
        """void qs_copy_8(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
  *(int2 *)to = *(const int2 *)from;
#endif
}""",
    ),
    "qs_copy_16": (
        "void",
        """void qs_copy_16(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
  *(int4 *)to = *(const int4 *)from;
#endif
}""",
    ),
    # The same through the first cache, for what will be read again soon.
    "qs_copy_cached_16": (
        "void",
        """void qs_copy_cached_16(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
  *(int4 *)to = *(const int4 *)from;
#endif
}""",
    ),
    # Fill 4, 8 or 16 bytes of shared memory with a 32-bit pattern.
    "qs_fill_4": ("void", "void qs_fill_4(void *to, int word) { *(int *)to = word; }"),
    "qs_fill_8": ("void", "void qs_fill_8(void *to, int word) { *(int2 *)to = make_int2(word, word); }"),
    "qs_fill_16": ("void", "void qs_fill_16(void *to, int word) { *(int4 *)to = make_int4(word, word, word, word); }"),
    # Write four bytes from registers to shared memory.
    "qs_put_4": ("void", "void qs_put_4(void *to, const void *word) { *(int *)to = *(const int *)word; }"),
    "qs_copies_commit": (
        "void",
        """void qs_copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}""",
    ),
    # Wait until at most `left` groups of copies of this thread are under way.
    **{
        f"qs_copies_wait_{left}": (
            "void",
            f"""void qs_copies_wait_{left}() {{
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group {left};" ::: "memory");
#endif
}}""",
        )
        for left in range(5)
    },
    # Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, and gets of
    # matrix j, in word j, elements 2 (l % 4) and the next of row l / 4.
    "qs_load_matrices_4": (
        "void",
        """void qs_load_matrices_4(void *to, const void *row) {
  unsigned *r = (unsigned *)to;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
    : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}""",
    ),
    "qs_load_matrices_2": (
        "void",
        """void qs_load_matrices_2(void *to, const void *row) {
  unsigned *r = (unsigned *)to;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1])
    : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}""",
    ),
    # sum[4] += a (16 x 32, uint8, four words) * b (32 x 8, int8 or uint8, two words): m16n8k32.
    **{
        f"qs_mma_u8{sign}8": (
            "void",
            f"""void qs_mma_u8{sign}8(void *sum, const void *left, const void *right) {{
  int *c = (int *)sum; const unsigned *a = (const unsigned *)left, *b = (const unsigned *)right;
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.{sign}8.s32 "
    "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.{sign}8.s32 {{%0, %1}}, {{%2}}, {{%3}}, {{%0, %1}};"
      : "+r"(c[i % 2 * 2]), "+r"(c[i % 2 * 2 + 1]) : "r"(a[i]), "r"(b[i / 2]));
#endif
}}""",
        )
        for sign in "su"
    },
    # sum[4] += a (16 x 16, float16, four words) * b (16 x 8, float16, two words), float32 sums: m16n8k16.
    "qs_mma_f16": (
        "void",
        """void qs_mma_f16(void *sum, const void *left, const void *right) {
  float *c = (float *)sum; const unsigned *a = (const unsigned *)left, *b = (const unsigned *)right;
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}""",
    ),
    # sum[4] += a (16 x 32, e4m3, four words) * b (32 x 8, e4m3, two words): m16n8k32. Sums have fewer bits than float32's
    # on some architectures.
    "qs_mma_e4m3": (
        "void",
        """void qs_mma_e4m3(void *sum, const void *left, const void *right) {
  float *c = (float *)sum; const unsigned *a = (const unsigned *)left, *b = (const unsigned *)right;
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}""",
    ),
    # sum[4] += a (16 x 8, float32 of which the upper 19 bits count, four words) * b (8 x 8, likewise, two words): m16n8k8.
    "qs_mma_tf32": (
        "void",
        """void qs_mma_tf32(void *sum, const void *left, const void *right) {
  float *c = (float *)sum; const unsigned *a = (const unsigned *)left, *b = (const unsigned *)right;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}""",
    ),
    # sum += a * b of four float32.
    "qs_dot_f32": (
        "void",
        """void qs_dot_f32(void *sum, const void *left, const void *right) {
  const float *a = (const float *)left, *b = (const float *)right;
#pragma unroll
  for (int i = 0; i < 4; ++i) *(float *)sum = __fmaf_rn(a[i], b[i], *(float *)sum);
}""",
    ),
    # sum += a * b of eight int16 in four words.
    "qs_dot_s16": (
        "void",
        """void qs_dot_s16(void *sum, const void *left, const void *right) {
  const int *a = (const int *)left, *b = (const int *)right;
#pragma unroll
  for (int i = 0; i < 4; ++i) *(int *)sum += (short)a[i] * (short)b[i] + (a[i] >> 16) * (b[i] >> 16);
}""",
    ),
}


def call(name: str, *arguments: Expr) -> Expr:
    """A call of a device function, as an expression."""
    dtype, source = FUNCTIONS[name]
    return cuda_func_call(name, *arguments, source_code=f"\n{_HEAD}{source}\n", return_type=dtype)


def perform(name: str, *arguments: Expr) -> None:
    """A call of a device function, as a statement."""
    T.evaluate(call(name, *arguments))
