package bpf

import (
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLicense: what an object tells the kernel of its licence is one that the kernel takes for compatible with the GPL
// (license_is_gpl_compatible in include/linux/license.h), without which it loads no program that calls the functions it
// keeps for those, and is among the licences that the sources name.
func TestLicense(t *testing.T) {
	const spdx = "// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)\n"
	programs, err := filepath.Glob("*/*.c")
	if err != nil || len(programs) < 2 {
		t.Fatal(programs, err)
	}
	for _, path := range append([]string{"kernel.h"}, programs...) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if head, _, _ := strings.Cut(string(text), "#"); !strings.Contains(head, spdx) {
			t.Errorf("%s does not say %q in its first comment", path, spdx)
		}
	}
	objects, err := filepath.Glob("*/*.o")
	if err != nil || len(objects) != 2*len(programs) { // for each order of bytes
		t.Fatal(objects, err)
	}
	for _, path := range objects {
		o, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		section := o.Section("license")
		if section == nil {
			t.Errorf("%s has no licence", path)
			continue
		}
		if data, err := section.Data(); err != nil || string(data) != "GPL\x00" {
			t.Errorf("%s has the licence %q, want GPL: %v", path, data, err)
		}
	}
}
