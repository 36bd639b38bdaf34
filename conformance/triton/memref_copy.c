/* The one function that MLIR's native code expects of a run-time library: copy a strided buffer. */
#include <stdint.h>
#include <string.h>

/* A ranked memref: two addresses, an offset in elements, then `rank` sizes and `rank` strides. */
struct memref {
    char *allocated;
    char *aligned;
    int64_t offset;
    int64_t sizes_and_strides[];
};

struct unranked_memref {
    int64_t rank;
    struct memref *memref;
};

static void copy(int64_t element, int64_t rank, const int64_t *sizes, const char *from,
                 const int64_t *from_strides, char *to, const int64_t *to_strides)
{
    if (rank == 0) {
        memcpy(to, from, element);
        return;
    }
    for (int64_t i = 0; i < sizes[0]; i++)
        copy(element, rank - 1, sizes + 1, from + i * from_strides[0] * element, from_strides + 1,
             to + i * to_strides[0] * element, to_strides + 1);
}

void memrefCopy(int64_t element, struct unranked_memref *from, struct unranked_memref *to)
{
    int64_t rank = from->rank;
    struct memref *source = from->memref, *target = to->memref;
    copy(element, rank, source->sizes_and_strides,
         source->aligned + source->offset * element, source->sizes_and_strides + rank,
         target->aligned + target->offset * element, target->sizes_and_strides + rank);
}
