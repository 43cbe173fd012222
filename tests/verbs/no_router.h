/* What devices.c needs of a router, for programs that have none: the port is as they set it. */
#ifndef FREEFLOW_TEST_NO_ROUTER_H
#define FREEFLOW_TEST_NO_ROUTER_H

#include "../../dataplane/verbs/client.h"
#include "../../dataplane/verbs/cm_device.h"
#include "../../dataplane/verbs/direct_files.h"
#include "../../dataplane/verbs/pair.h"

const struct freeflow_services *client_services(void)
{
        static const struct freeflow_services services;

        return &services;
}

bool client_open(int patience)
{
        (void)patience;
        return true;
}

void pair_start(void)
{
}

void cm_start(void)
{
}

void direct_files_start(void)
{
}

#endif
