#!/bin/sh
# Runs the compiler that it is given. What ptxas says of registers, stack and spills stays in <object>.ptxas, and wgmma
# that the compiler serializes (C7508, C7510, C7511: a note to ptxas, a multiple of the run time to us) is an error.
out=
for word; do
  [ "$before" = -o ] && out=$word
  before=$word
done
"$@" 2>"$out.ptxas"
status=$?
grep -v '^ptxas info\|^    0 bytes stack frame' "$out.ptxas" >&2
if [ $status = 0 ] && grep 'Potential Performance Loss' "$out.ptxas" >&2; then
  rm -f "$out"
  status=1
fi
exit $status
