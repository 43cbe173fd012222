/* Doubly linked lists with the nodes inside the listed structures. A node that is in no list points
 * to itself. */
#ifndef FREEFLOW_RELAY_LIST_H
#define FREEFLOW_RELAY_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct node {
        struct node *before, *after;
};

#define LIST(name)                                                                                           \
        {                                                                                                    \
                &(name), &(name)                                                                             \
        }
#define OF(node, type, member) ((type *)(void *)((char *)(node)-offsetof(type, member)))

static inline void list_init(struct node *node)
{
        node->before = node->after = node;
}

/* Of a list: has it nodes? Of a node: is it in a list? */
static inline bool list_holds(const struct node *node)
{
        return node->after != node;
}

static inline void list_remove(struct node *node)
{
        node->before->after = node->after;
        node->after->before = node->before;
        list_init(node);
}

/* Appends the node. Does nothing if it is in a list already. */
static inline void list_add(struct node *list, struct node *node)
{
        if (list_holds(node))
                return;
        node->before = list->before;
        node->after = list;
        list->before->after = node;
        list->before = node;
}

/* Appends the nodes of `from`, which has none then. */
static inline void list_take(struct node *list, struct node *from)
{
        while (list_holds(from)) {
                struct node *node = from->after;

                list_remove(node);
                list_add(list, node);
        }
}

/* The list begins with this node from now on; those before it come last. */
static inline void list_begin(struct node *list, struct node *first)
{
        list_remove(list);
        list->before = first->before;
        list->after = first;
        first->before->after = list;
        first->before = list;
}

/* Each node of a list; the current one may be removed. */
#define EACH(node, list)                                                                                     \
        for (struct node *node = (list)->after, *node##_next = node->after; node != (list);                  \
             node = node##_next, node##_next = node->after)

#endif
