/*
 * The border between Python and the virtual machine's C: read by cffi and included by vmm.h, so the two cannot drift.
 * Only plain structs, prototypes and numeric #defines may stand here (cffi takes nothing else).
 *
 * Return codes: >= 0 is success; -1 .. -4095 is a negated errno; VMM_E_* (below -4095) are our own.
 * Threads: unless it says otherwise a function is called by Python, on one thread; the vCPU threads are C's alone.
 */

#define VMM_E_WINDOWS -6001  /* no room for a further device window */
#define VMM_E_OVERLAP -6002  /* the window or its port is another's */
#define VMM_E_RUNNING -6003  /* not while the vCPUs run */

#define VMM_VCPUS_MAX 64
#define VMM_WINDOWS_MAX 32
#define VMM_QUEUES_MAX 256

/* ---- what /dev/kvm can do: host.c ---- */

struct kvm_abilities { /* what KVM_CHECK_EXTENSION says; 0: lacking */
	int api_version;
	int user_memory;
	int irqchip;
	int pit;
	int irqfd;
	int ioeventfd;
	int ioeventfd_any_length; /* the wildcard: length 0 */
	int immediate_exit;
	int hyperv_eventfd;
	int tsc_deadline;
	int vcpus_max;
};

struct cpuid_entry {
	uint32_t leaf;
	uint32_t subleaf;
	uint32_t flags; /* KVM_CPUID_FLAG_*: 1: the subleaf counts */
	uint32_t eax, ebx, ecx, edx;
};

int kvm_probe(int kvm_fd, struct kvm_abilities *out);
/* How many entries were written; -E2BIG: more than `capacity`. */
int kvm_supported_cpuid(int kvm_fd, struct cpuid_entry *entries, uint32_t capacity);

/* ---- the machine: vm.c ---- */

#define VM_STEP_CREATE 0
#define VM_STEP_TSS 1
#define VM_STEP_IDENTITY_MAP 2
#define VM_STEP_IRQCHIP 3
#define VM_STEP_PIT 4
#define VM_STEP_RAM 5
#define VM_STEP_MEMORY_SLOT 6
#define VM_STEP_VCPU 7
#define VM_STEP_VCPU_STATE 8
#define VM_STEP_ALLOCATE 9

struct vm;

struct vm_failure {
	int code;
	uint32_t step; /* VM_STEP_* */
};

/*
 * A VM with `ram_size` bytes of the memory file at gpa 0, an interrupt controller and timer in the kernel, and
 * `vcpus` virtual CPUs that do not run yet. `event_fd` (Python's, non-blocking) is written whenever there is something
 * to take: an access, output, a thread's end. NULL: *failure says where and why.
 */
struct vm *vm_new(int kvm_fd, int ram_fd, uint64_t ram_size, uint32_t vcpus, int event_fd, struct vm_failure *failure);
/* No vCPU thread may run any more. */
void vm_free(struct vm *vm);

#define VM_BELL_PIO 1
#define VM_BELL_DATAMATCH 2
#define VM_BELL_REMOVE 4

int vm_ioeventfd(struct vm *vm, uint64_t address, uint32_t length, uint64_t datamatch, uint32_t flags, int fd);
int vm_irqfd(struct vm *vm, uint32_t gsi, int fd, int remove);
/* KVM_HYPERV_EVENTFD: -EEXIST when taken, -ENOTTY or -EINVAL where the kernel has none. */
int vm_hypercall_id(struct vm *vm, uint32_t connection_id, int fd, int remove);

int vcpu_set_cpuid(struct vm *vm, uint32_t vcpu, const struct cpuid_entry *entries, uint32_t count);

#define VM_ENTER_PVH 0        /* 32-bit protected mode, no paging, flat segments; rbx and rip count */
#define VM_ENTER_LONG_MODE 1  /* 64-bit, with the page tables at cr3 */

struct entry_state {
	uint32_t mode;
	uint64_t rip, rbx, rcx, rdx, rsi, rdi, rsp, cr3;
};

/* Put vCPU 0 into its first state. The others wait for INIT and SIPI. */
int vm_enter_at(struct vm *vm, const struct entry_state *state);

/* ---- device windows: window.c ---- */

struct window;

/*
 * Accesses to [gpa, gpa + size) are this device's. With `interrupt_status` (an atomic uint32_t that outlives the VM)
 * InterruptStatus and InterruptACK are served in the vCPU's thread. `notify_port`: 0, or where an `out` means what a
 * write to QueueNotify means. NULL: *error.
 */
struct window *vm_add_window(struct vm *vm, uint64_t gpa, uint64_t size, void *interrupt_status, uint32_t notify_port,
			     int *error);
/* What a notification that no ioeventfd took rings; -1: nothing, it is a stray. Any time; C has a duplicate. */
int window_set_kick(struct window *w, uint32_t queue, int fd);
uint64_t window_strays(struct window *w);

/* ---- running: vcpu.c ---- */

int vm_start(struct vm *vm); /* one thread a vCPU */
void vm_stop(struct vm *vm); /* every vCPU leaves the guest, and its wait for an answer; again is harmless */
uint32_t vm_running(struct vm *vm); /* threads that have not ended */
void vm_join(struct vm *vm);

/* ---- accesses that Python answers: handover.c ---- */

struct access {
	uint32_t vcpu;
	uint32_t window;
	uint32_t offset;
	uint32_t length;
	uint32_t is_write;
	uint64_t data;
};

/* 1: *out is one that waits now for vm_answer; 0: there is none. */
int vm_take_access(struct vm *vm, struct access *out);
void vm_answer(struct vm *vm, uint32_t vcpu, uint64_t data);

/* ---- the guest's output: output.c ---- */

/* How many bytes were copied to `buffer`. */
uint32_t vm_take_output(struct vm *vm, uint8_t *buffer, uint32_t capacity);

/* ---- how it ended: ending.c; counters: vm.c ---- */

#define VM_END_NONE 0
#define VM_END_EXIT 1      /* the guest wrote its status to the exit port */
#define VM_END_POWER_OFF 2
#define VM_END_RESET 3
#define VM_END_FAILED 4

#define VM_RESET_TRIPLE_FAULT 1

struct vm_end {
	uint32_t kind;
	uint32_t status;      /* of an exit: the guest's; of a reset: VM_RESET_*, or 0 when it asked for it */
	uint32_t vcpu;
	int error;            /* of KVM_RUN: a negated errno, or 0 */
	uint32_t exit_reason; /* KVM_EXIT_*, the reasons of a failure */
	uint32_t words;       /* how many of data count */
	uint64_t data[16];
	uint64_t rip;
};

struct vm_stats {
	uint64_t exits;
	uint64_t handed_over;
	uint64_t served;
	uint64_t stray_notifies;
	uint64_t pio;
	uint64_t unknown_mmio;
	uint64_t unknown_pio;
	uint64_t refused_hypercalls;
	uint64_t output_dropped;
};

void vm_read_end(struct vm *vm, struct vm_end *out);
void vm_read_stats(struct vm *vm, struct vm_stats *out);

/* ---- what a doorbell costs: ring_guest.c, acknowledger.c ---- */

#define RING_NOTHING 0 /* between the two time stamps: what measuring itself takes */
#define RING_CPUID 1
#define RING_OUT 2     /* a 16-bit `out` of `value` to the port `address` */
#define RING_STORE 3   /* a 32-bit store of `value` to `address` */
#define RING_VMCALL 4  /* HvCallSignalEvent with the connection id `address`, as Intel has it */
#define RING_VMMCALL 5 /* ... as AMD has it */
#define RING_WRMSR 6   /* `value` to the register `address`: no doorbell, but needed for hypercalls */
#define RING_LOOP 7    /* a loop of `address` rounds: how fast plain instructions are */

/* What the measuring guest does next: it lies in guest memory, and the guest writes its second half. */
struct ring_step {
	uint64_t kind;
	uint64_t count;
	uint64_t address;
	uint64_t value;
	uint64_t samples_gpa; /* room for `count` numbers: the cycles of each ring that was not refused */
	uint64_t ack_gpa;     /* 0: nobody waits; else two numbers: rings that the waiter saw, and that the guest made */
	uint64_t pause;       /* cycles before each ring of a waiter, so that it sleeps */
	uint64_t patience;    /* cycles after which a ring is unanswered, which ends the step */
	uint64_t done;
	uint64_t refused;
	uint64_t status;      /* of the last that was refused */
	uint64_t unanswered;
	uint64_t begin, end;  /* by the guest's time stamp counter */
};

/* The code, entered in long mode with interrupts off: rdi = the first step, rsi = how many. Ends by the exit port. */
const uint8_t *ring_guest_code(void);
uint64_t ring_guest_size(void);
/* The guest's RING_LOOP in this process, in cycles. */
uint64_t host_loop(uint64_t iterations);
/* What CPUID says to this process: flags stays 0. */
void host_cpuid(uint32_t leaf, uint32_t subleaf, struct cpuid_entry *out);

struct acknowledger;

/*
 * A thread that reads `event_fd` whenever it is rung and stores the sum at `gpa` (page-aligned) of the memory file; C
 * has duplicates. It runs where the caller may run at this moment. NULL: *error.
 */
struct acknowledger *acknowledger_new(int event_fd, int ram_fd, uint64_t gpa, int *error);
void acknowledger_free(struct acknowledger *a);
