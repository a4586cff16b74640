# Shows that Xen, its tools and the benchmark guest work.
xl info | grep -E '^(xen_version|nr_cpus|virt_caps|free_memory)' || exit
echo "@progress 1 3 creating the guest"
xl create -q /guest/guest.cfg || exit
echo "@progress 2 3 listing domains"
xl list | tee "$OUT/domains"
xl vcpu-list | tee "$OUT/vcpus"
grep -q '^bench ' "$OUT/domains" || exit
xl destroy bench || exit
echo "@progress 3 3 done"
