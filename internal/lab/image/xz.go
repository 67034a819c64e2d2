package image

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// xzReader reads xz files: blocks of LZMA2, each followed by a checksum, and an index of them, as
// https://tukaani.org/xz/xz-file-format.txt describes (1.2.1). github.com/ulikunitz/xz decodes LZMA2. Rejected: its reader
// of whole files, which makes the dictionary as large as the file demands, up to 4 GiB.
type xzReader struct {
	r         *bufio.Reader
	at        int64 // bytes read of the stream
	maxWindow int64
	flags     [2]byte   // of the stream
	check     hash.Hash // of a block's content, nil without a checksum
	block     *lzma.Reader2
	start     int64 // where the block began
	content   int64 // the block's uncompressed bytes so far
	limits    blockHeader
	blocks    uint64
	records   hash.Hash32 // of the index that follows from the blocks read so far
	recorded  int64       // its size
	ended     bool        // between streams
}

// blockHeader is the header of a block; a size is -1 if the header omits it.
type blockHeader struct {
	compressed, content int64
	size                int64 // the header's own
	window              int64
}

// The errors of xz files: all but errWindow mean damage.
var (
	errWindow     = errors.New("the window is too large")
	errXzHeader   = errors.New("a header is malformed")
	errXzFilter   = errors.New("it uses a filter other than LZMA2")
	errXzCheck    = errors.New("it uses an unknown kind of checksum")
	errXzChecksum = errors.New("a checksum does not match")
	errXzSize     = errors.New("a block has another size than recorded")
	errXzIndex    = errors.New("the index does not match the blocks")
)

var xzMagic = []byte("\xfd7zXZ\x00")

// newXzReader reads a stream's header. No more than maxWindow bytes of the content are held at any time.
func newXzReader(r *bufio.Reader, maxWindow int64) (*xzReader, error) {
	x := &xzReader{r: r, maxWindow: maxWindow}
	return x, whole(x.begin())
}

// whole turns an end of file in the middle of something into an error.
func whole(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *xzReader) Read(p []byte) (int, error) {
	for len(p) > 0 {
		if x.block == nil {
			more, err := x.next()
			if err != nil || !more {
				return 0, err
			}
			continue
		}
		n, err := x.block.Read(p)
		x.content += int64(n)
		if x.check != nil {
			x.check.Write(p[:n])
		}
		if err == io.EOF {
			if err = io.ErrUnexpectedEOF; x.block.EOS() {
				err = whole(x.endBlock())
			}
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, nil
}

// next starts the next block or, after the index, the next stream. It returns false at the end of the file.
func (x *xzReader) next() (more bool, err error) {
	if x.ended {
		// Streams may follow each other, padded with zeros in groups of four.
		for {
			head, err := x.r.Peek(4)
			if len(head) == 0 && err == io.EOF {
				return false, io.EOF
			}
			if len(head) < 4 {
				return false, whole(err)
			}
			if !bytes.Equal(head, make([]byte, 4)) {
				return true, whole(x.begin())
			}
			_, _ = x.r.Discard(4)
		}
	}
	head, err := x.r.Peek(1)
	if err != nil {
		return false, whole(err)
	}
	if head[0] == 0 {
		return true, whole(x.endStream())
	}
	return true, whole(x.beginBlock())
}

// take reads exactly n bytes of the stream; n is at most the size of a block's header.
func (x *xzReader) take(n int) ([]byte, error) {
	data := make([]byte, n)
	_, err := io.ReadFull(counted{x}, data)
	return data, err
}

// counted reads from the file and counts the bytes.
type counted struct{ x *xzReader }

func (c counted) Read(p []byte) (int, error) {
	n, err := c.x.r.Read(p)
	c.x.at += int64(n)
	return n, err
}

func (c counted) ReadByte() (byte, error) {
	b, err := c.x.r.ReadByte()
	if err == nil {
		c.x.at++
	}
	return b, err
}

// begin reads the header of a stream: the magic bytes, two of flags and their CRC32.
func (x *xzReader) begin() error {
	head, err := x.take(12)
	if err != nil {
		return err
	}
	if !bytes.Equal(head[:6], xzMagic) || head[6] != 0 || crc32.ChecksumIEEE(head[6:8]) != binary.LittleEndian.Uint32(head[8:]) {
		return errXzHeader
	}
	switch head[7] {
	case 0:
		x.check = nil
	case 1:
		x.check = crc32.NewIEEE()
	case 4:
		x.check = crc64.New(crc64.MakeTable(crc64.ECMA))
	case 10:
		x.check = sha256.New()
	default:
		return errXzCheck
	}
	x.flags = [2]byte(head[6:8])
	x.at, x.blocks, x.records, x.recorded, x.ended = 0, 0, crc32.NewIEEE(), 0, false
	return nil
}

// beginBlock reads the header of a block.
func (x *xzReader) beginBlock() error {
	x.start, x.content = x.at, 0
	size, err := x.take(1)
	if err != nil {
		return err
	}
	rest, err := x.take((int(size[0])+1)*4 - 1)
	if err != nil {
		return err
	}
	h, err := parseBlockHeader(append(size, rest...))
	switch {
	case err != nil:
		return err
	case h.window > x.maxWindow:
		return errWindow
	}
	x.limits = h
	if x.check != nil {
		x.check.Reset()
	}
	x.block, err = lzma.Reader2Config{DictCap: int(max(h.window, lzma.MinDictCap))}.NewReader2(counted{x})
	return err
}

// parseBlockHeader reads a whole header, from its length to its CRC32.
func parseBlockHeader(head []byte) (blockHeader, error) {
	h := blockHeader{compressed: -1, content: -1, size: int64(len(head))}
	end := len(head) - 4
	if end < 4 || crc32.ChecksumIEEE(head[:end]) != binary.LittleEndian.Uint32(head[end:]) {
		return h, errXzHeader
	}
	flags, fields := head[1], head[2:end]
	number := func() int64 {
		n, used := binary.Uvarint(fields)
		if used <= 0 || n > 1<<62 {
			fields = nil
			return -1
		}
		fields = fields[used:]
		return int64(n)
	}
	switch {
	case flags&0x3c != 0:
		return h, errXzHeader
	case flags&3 != 0: // the number of filters minus one
		return h, errXzFilter
	}
	if flags&0x40 != 0 {
		if h.compressed = number(); h.compressed <= 0 {
			return h, errXzHeader
		}
	}
	if flags&0x80 != 0 {
		if h.content = number(); h.content < 0 {
			return h, errXzHeader
		}
	}
	if len(fields) < 3 {
		return h, errXzHeader
	}
	if fields[0] != 0x21 || fields[1] != 1 {
		return h, errXzFilter
	}
	bits := fields[2]
	switch {
	case bits > 40:
		return h, errXzHeader
	case bits == 40:
		h.window = 1<<32 - 1
	default:
		h.window = int64(2|bits&1) << (bits/2 + 11)
	}
	for _, zero := range fields[3:] {
		if zero != 0 {
			return h, errXzHeader
		}
	}
	return h, nil
}

// endBlock checks a block that was read to its end.
func (x *xzReader) endBlock() error {
	x.block = nil
	compressed := x.at - x.start - x.limits.size
	if x.limits.compressed >= 0 && x.limits.compressed != compressed || x.limits.content >= 0 && x.limits.content != x.content {
		return errXzSize
	}
	if err := x.padding(); err != nil {
		return err
	}
	length := int64(0)
	if x.check != nil {
		length = int64(x.check.Size())
		sum, err := x.take(int(length))
		if err != nil {
			return err
		}
		want := x.check.Sum(nil)
		if x.flags[1] != 10 { // CRCs are little-endian
			reverse(want)
		}
		if !bytes.Equal(sum, want) {
			return errXzChecksum
		}
	}
	record := binary.AppendUvarint(nil, uint64(x.limits.size+compressed+length))
	record = binary.AppendUvarint(record, uint64(x.content))
	x.records.Write(record)
	x.recorded += int64(len(record))
	x.blocks++
	return nil
}

func reverse(b []byte) {
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
}

// padding reads the zeros up to the next multiple of four.
func (x *xzReader) padding() error {
	zeros, err := x.take(int(-x.at & 3))
	if err == nil && !bytes.Equal(zeros, make([]byte, len(zeros))) {
		err = errXzHeader
	}
	return err
}

// endStream reads the index, which repeats the sizes of all blocks, and the footer.
func (x *xzReader) endStream() error {
	begin := x.at
	sum := crc32.NewIEEE()
	all := io.TeeReader(counted{x}, sum)
	// The index has to begin with a zero and the known number of blocks.
	want := binary.AppendUvarint([]byte{0}, x.blocks)
	head := make([]byte, len(want))
	if _, err := io.ReadFull(all, head); err != nil {
		return err
	}
	records := crc32.NewIEEE()
	if _, err := io.CopyN(records, all, x.recorded); err != nil {
		return err
	}
	zeros := make([]byte, -x.at&3)
	if _, err := io.ReadFull(all, zeros); err != nil {
		return err
	}
	if !bytes.Equal(head, want) || records.Sum32() != x.records.Sum32() || !bytes.Equal(zeros, make([]byte, len(zeros))) {
		return errXzIndex
	}
	tail, err := x.take(4 + 12)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(tail) != sum.Sum32() {
		return errXzIndex
	}
	size, footer := x.at-12-begin, tail[4:]
	if crc32.ChecksumIEEE(footer[4:10]) != binary.LittleEndian.Uint32(footer) || string(footer[10:]) != "YZ" ||
		[2]byte(footer[8:10]) != x.flags || (int64(binary.LittleEndian.Uint32(footer[4:]))+1)*4 != size {
		return errXzHeader
	}
	x.ended = true
	return nil
}
