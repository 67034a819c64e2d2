package testenv

import "bytes"

// Damages is what power cuts and bad disks make of a file, by what was done to it. A file that was renamed into place
// before its data had reached the disk is empty (ext4) or zeros (xfs), in whole or from some block on.
func Damages(whole []byte) map[string][]byte {
	half := len(whole) / 2
	return map[string][]byte{
		"empty":              {},
		"cut in half":        whole[:half],
		"without its last":   whole[:max(0, len(whole)-1)],
		"only its first":     whole[:min(1, len(whole))],
		"zeros":              make([]byte, len(whole)),
		"zeros from half on": append(bytes.Clone(whole[:half]), make([]byte, len(whole)-half)...),
		"garbage":            bytes.Repeat([]byte{0xde, 0xad, '"', 0xff}, len(whole)/4+1),
		"twice":              append(bytes.Clone(whole), whole...),
	}
}
