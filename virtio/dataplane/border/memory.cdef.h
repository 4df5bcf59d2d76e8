/* Guest memory: memory/. */

#define DP_PERM_READ 1
#define DP_PERM_WRITE 2

struct mapping;      /* one mmap of a region's file, refcounted, guarded against SIGBUS */
struct memory_table; /* immutable list of mapped regions, refcounted */
struct iotlb;        /* I/O virtual to user virtual addresses, shared and locked */

struct memory_region {
	uint64_t gpa;
	uint64_t size;
	uint64_t uva;
	struct mapping *mapping;
};

/* The magic number (statfs(2)) of the file system that `fd` is on; it may take its time to answer. 0 or -errno. */
int file_system(int fd, uint32_t *magic);

/* Map `size` bytes of `fd` at `offset`; NULL and *error on failure (DP_E_SHORT_FILE: file ends before). */
struct mapping *mapping_new(int fd, uint64_t offset, uint64_t size, int *error);
void mapping_unref(struct mapping *m);
int mapping_dead(struct mapping *m);
void *mapping_base(struct mapping *m);

/* Takes a reference of each region's mapping. Regions must not overlap. NULL: out of memory. */
struct memory_table *memory_table_new(const struct memory_region *regions, uint32_t count);
void memory_table_unref(struct memory_table *t);

struct iotlb *iotlb_new(void);
void iotlb_unref(struct iotlb *tlb);
int iotlb_update(struct iotlb *tlb, uint64_t iova, uint64_t size, uint64_t uva, uint32_t perm);
void iotlb_invalidate(struct iotlb *tlb, uint64_t iova, uint64_t size);
void iotlb_clear(struct iotlb *tlb);

/* Install the SIGBUS handler, once a process; call it again after somebody replaced it. */
int sigbus_install(void);
