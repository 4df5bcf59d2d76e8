/* What a native device waits for beside its queues. Worker thread only. */
#include "worker/worker.h"

void source_add(struct worker *w, struct source *source, struct native_device *device)
{
	source->wanted = true;
	/* Whatever came before anybody watched is still there. */
	source->ready = UINT32_MAX;
	if (source->watched)
		return; /* removed a moment ago, and not gone yet: source_removed will see that it is wanted again */
	source->device = native_device_ref(device);
	source->watched = true;
	if (w->reactor->add_source(w, source) < 0)
		source_removed(w, source);
}

void source_remove(struct worker *w, struct source *source)
{
	source->wanted = false;
	if (source->watched)
		w->reactor->remove_source(w, source);
}

void source_rang(struct source *source, uint32_t events)
{
	source->ready |= events;
}

void source_removed(struct worker *w, struct source *source)
{
	if (source->wanted && w->reactor->add_source(w, source) == 0)
		return;
	source->watched = false;
	native_device_unref(source->device); /* may free the source */
}
