/* The numbers of queue pairs: which ones this process may give, and whose each one is.
 *
 * The router gives the process ranges of numbers, unique in its container. A number that was
 * returned is given again as late as possible, so that what still arrives for the one before finds
 * nobody.
 */
#ifndef FREEFLOW_NUMBERS_H
#define FREEFLOW_NUMBERS_H

#include <stdbool.h>
#include <stdint.h>

enum { NUMBER_RANGES = 16, NUMBERS = 4096 /* in a range, at most */ };

/* A range that the router has given. False: it is too large, or there are too many of them. A range
 * that is known already is no other one. */
bool numbers_add(uint32_t first, uint32_t count);
/* A number for an object; 0: there is none. */
uint32_t number_take(void *owner);
void number_return(uint32_t number);
/* Call `use` for each owner, none of which can return its number meanwhile. */
void numbers_each(void (*use)(void *owner, void *argument), void *argument);
/* In a child of fork(): none is known, and none has an owner. */
void numbers_forget(void);
/* Call `use` for the owner of a number, who can't return it meanwhile. False: it has none. */
bool number_use(uint32_t number, void (*use)(void *owner, void *argument), void *argument);

#endif
