/* virtio-mmio's InterruptStatus: ring/interrupt.c. */

#define INTERRUPT_USED_BUFFER 1
#define INTERRUPT_CONFIG_CHANGE 2

struct interrupt_status; /* one atomic word, refcounted: workers set it, a vCPU thread reads and clears it */

struct interrupt_status *interrupt_status_new(void);
void interrupt_status_unref(struct interrupt_status *status);
/* Where the word is, for the vCPU threads of another module; valid while a reference is held. */
uint32_t *interrupt_status_word(struct interrupt_status *status);
/* Any thread. */
void interrupt_status_raise(struct interrupt_status *status, uint32_t bits);
void interrupt_status_acknowledge(struct interrupt_status *status, uint32_t bits);
uint32_t interrupt_status_value(struct interrupt_status *status);
