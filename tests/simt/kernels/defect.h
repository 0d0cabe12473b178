// Seeded defects: with -DDEFECT=n a kernel is wrong in one place. defects.py says which n is what.
#pragma once

#ifndef DEFECT
#define DEFECT 0
#endif
