/* C11's atomic loads and stores with a weak order, under short names. What an access pairs with is
 * said where it is made, or in layout.h. Those without an order are sequentially consistent. */
#ifndef FREEFLOW_ATOMICS_H
#define FREEFLOW_ATOMICS_H

#include <stdatomic.h>

#define load_relaxed(place) atomic_load_explicit((place), memory_order_relaxed)
#define load_acquire(place) atomic_load_explicit((place), memory_order_acquire)
#define store_relaxed(place, value) atomic_store_explicit((place), (value), memory_order_relaxed)
#define store_release(place, value) atomic_store_explicit((place), (value), memory_order_release)

#endif
