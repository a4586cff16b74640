/* The control page: what hyperbp-bench in dom0 asks for, and what it is answered. */
#ifndef HYPERBP_MAILBOX_H
#define HYPERBP_MAILBOX_H

/* Does what is asked for until that is to end. */
void mailbox_serve(void);

#endif
